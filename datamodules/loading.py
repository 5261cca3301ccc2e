"""What runs in worker processes: samples are read there, and an error comes back as it was.

Lightning is not imported here, which makes workers start twice as fast.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch.utils.data import DataLoader, Dataset

from bernini.conversation import Batch
from bernini.errors import BerniniError, ConfigError
from bernini.planner.vision import VisionConfig, add_visuals
from bernini.tasks import get_task
from datamodules.mixing import SourceConfig
from datamodules.order import Request
from datamodules.shards import Shards
from datamodules.storage import StorageConfig


@dataclass(frozen=True)
class Span:
    """Samples of one source, which are numbered through.

    Attributes:
        first: Number of the first one.
        shards: How many there are of each shard.
        fingerprint: Hash of the shards, and of which of their samples these are.
    """

    first: int
    shards: list[int]
    fingerprint: str


class Clips(Dataset[Batch]):
    """Samples of one split; what is asked for comes as one batch.

    Args:
        sources: Sources by name.
        tasks: Tasks to keep of a source that does not say so itself; ``None`` keeps all.
        limit: Most samples; the first ones are kept.
        targets: Whether every sample must have a target.
        max_frames: Most frames of a raw clip.
        max_edge: Longest edge of raw frames in pixels.
        vision: Make what a planner with these numbers sees, too; null for nothing.
        storage: How the folders are reached.

    Attributes:
        spans: Where the samples of each source are.

    Raises:
        ConfigError: A folder holds no shards, or a task is unknown or has no sample.
        DataError: A shard is damaged.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceConfig],
        tasks: list[str] | None,
        limit: int | None,
        targets: bool,
        max_frames: int | None,
        max_edge: int | None,
        vision: VisionConfig | None = None,
        storage: StorageConfig | None = None,
    ) -> None:
        self.samples: list[tuple[Shards, int]] = []
        self.spans: list[Span] = []
        opened: dict[str, Shards] = {}
        for source in sources.values():
            folders = [source.shards] if isinstance(source.shards, str) else source.shards
            shards = [opened.get(folder) or opened.setdefault(folder, Shards(folder, storage)) for folder in folders]
            self._add(shards, tasks if source.tasks is None else source.tasks)
        self.samples = self.samples[:limit]
        self.targets, self.max_frames, self.max_edge, self.vision = targets, max_frames, max_edge, vision

    def _add(self, shards: list[Shards], tasks: list[str] | None) -> None:
        """Number the samples of one source, after those that are numbered already."""
        kept = None if tasks is None else {get_task(name).name for name in tasks}
        every = [(s, n, get_task(entry.task).name) for s in shards for n, entry in enumerate(s.entries)]
        here = sorted({task for *_, task in every})
        if missing := sorted((kept or set()) - set(here)):
            raise ConfigError(
                f"no sample of task {missing[0]}",
                where=", ".join(str(s.folder) for s in shards),
                why=f"the shards hold {', '.join(here)}",
            )
        found = [(s, n) for s, n, task in every if kept is None or task in kept]
        if not found:
            raise ConfigError("the shards hold no sample", where=", ".join(str(s.folder) for s in shards))
        in_shards = [
            len(list(group)) for _, group in groupby(found, lambda at: (at[0].folder, at[0].entries[at[1]].shard))
        ]
        which = repr([[s.fingerprint for s in shards], sorted(kept or here)])
        fingerprint = hashlib.sha256(which.encode()).hexdigest()[:16]
        self.spans.append(Span(len(self.samples), in_shards, fingerprint))
        self.samples += found

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, request: Request) -> Batch:
        batch = Batch([], request.cursor)
        for position, number in enumerate(request.samples):
            shards, at = self.samples[number]
            sample = shards.read(at, max_frames=self.max_frames, max_edge=self.max_edge)
            if position >= len(request.samples) - request.padding:
                sample.info = {**sample.info, "padding": True}
            if self.vision:
                add_visuals(sample, self.vision)
            batch.samples.append(sample.check(targets=self.targets))
        return batch


class ErrorsAsValues(Dataset[Any]):
    """Items of another data set, or the error that reading one raised.

    Args:
        dataset: The other data set.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.dataset[item]
        except BerniniError as error:
            return error


class Loader(DataLoader[Any]):
    """A ``DataLoader`` over `ErrorsAsValues` that raises the errors in the main process.

    It has the methods by which Lightning tells that a loader can be resumed, and nothing to save: the cursor is the
    data module's, since Lightning at times forgets what a loader saves.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for item in super().__iter__():
            if isinstance(item, BerniniError):
                raise item
            yield item

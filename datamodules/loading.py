"""What runs in worker processes: samples are read there, and an error comes back as it was.

Lightning is not imported here, which makes workers start twice as fast.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from bernini.conversation import Batch
from bernini.errors import BerniniError, ConfigError
from bernini.planner.vision import VisionConfig, add_visuals
from bernini.tasks import get_task
from datamodules.buckets import Bounds
from datamodules.order import Request
from datamodules.shards import Shards


class Clips(Dataset[Batch]):
    """Samples of one split; what is asked for comes as one batch.

    Args:
        folders: Folders of shards.
        tasks: Tasks to keep; ``None`` keeps all.
        limit: Most samples; the first ones are kept.
        targets: Whether every sample must have a target.
        bounds: What is taken of raw images and clips.
        vision: Make what a planner with these numbers sees, too; null for nothing.

    Raises:
        ConfigError: A folder holds no shards, or a task is unknown or has no sample.
        DataError: A shard is damaged.
    """

    def __init__(
        self,
        folders: Sequence[str],
        tasks: Sequence[str] | None,
        limit: int | None,
        targets: bool,
        bounds: Bounds,
        vision: VisionConfig | None = None,
    ) -> None:
        self.shards = [Shards(folder) for folder in folders]
        kept = None if tasks is None else {get_task(name).name for name in tasks}
        every = [(s, n, get_task(e.task).name) for s in self.shards for n, e in enumerate(s.entries)]
        self.samples = [(s, n, task) for s, n, task in every if kept is None or task in kept][:limit]
        here = sorted({task for *_, task in every})
        if missing := sorted((kept or set()) - set(here)):
            raise ConfigError(
                f"no sample of task {missing[0]}", where=", ".join(folders), why=f"the shards hold {', '.join(here)}"
            )
        self.targets, self.bounds, self.vision = targets, bounds, vision

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, request: Request) -> Batch:
        batch = Batch([], request.cursor)
        for position, number in enumerate(request.samples):
            shards, at, _ = self.samples[number]
            sample = shards.read(at, self.bounds)
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

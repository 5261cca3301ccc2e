"""What runs in worker processes: samples are read there, and an error comes back as it was.

Lightning is not imported here, which makes workers start twice as fast.
"""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from bernini.conversation import Batch, Conversation
from bernini.errors import BadSample, BerniniError, ConfigError, DataError
from bernini.planner.vision import VisionConfig, add_visuals
from bernini.tasks import get_task
from datamodules.buckets import Bounds, tokens
from datamodules.index import Shown
from datamodules.mixing import SourceConfig
from datamodules.order import Request, permutation
from datamodules.shards import Shards
from datamodules.storage import StorageConfig

BAD_SAMPLES = "bad_samples.jsonl"
MOST_IN_A_ROW = 100


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
        bounds: What is taken of raw images and clips.
        vision: Make what a planner with these numbers sees, too; null for nothing.
        storage: How the folders are reached.
        seed: Seed of the order in which other samples take the place of bad ones; null has their errors raised.

    Attributes:
        spans: Where the samples of each source are.
        tokens: Tokens of each sample where `count_tokens` has been called; then none takes the place of a shorter one.

    Raises:
        ConfigError: A folder holds no shards, or a task is unknown or has no sample.
        DataError: An index is damaged.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceConfig],
        tasks: list[str] | None,
        limit: int | None,
        targets: bool,
        bounds: Bounds,
        vision: VisionConfig | None = None,
        storage: StorageConfig | None = None,
        seed: int | None = None,
    ) -> None:
        self.samples: list[tuple[Shards, int]] = []
        self.spans: list[Span] = []
        opened: dict[str, Shards] = {}
        for source in sources.values():
            folders = [source.shards] if isinstance(source.shards, str) else source.shards
            shards = [opened.get(folder) or opened.setdefault(folder, Shards(folder, storage)) for folder in folders]
            self._add(shards, tasks if source.tasks is None else source.tasks)
        self.samples = self.samples[:limit]
        self.targets, self.bounds, self.vision, self.seed = targets, bounds, vision, seed
        self._alike: dict[tuple[int, str], np.ndarray] = {}
        self.tokens: np.ndarray | None = None

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

    def count_tokens(self) -> np.ndarray:
        """Tokens that the renderer makes of each sample, by the sizes in the index and the bounds."""
        entries, count = (shards.entries[at] for shards, at in self.samples), cache(self._tokens)
        self.tokens = np.asarray([sum(map(count, entry.shown)) for entry in entries])
        return self.tokens

    def _tokens(self, shown: Shown) -> int:
        size = shown.frames, shown.height, shown.width
        return tokens(*(size if shown.prepared else self.bounds.bucket(*size)))

    def __getitem__(self, request: Request) -> Batch:
        batch = Batch([], request.cursor, place=request.place, weight=request.weight)
        for position, number in enumerate(request.samples):
            sample = self._read(number) if self.seed is None else self._good(number, request.epochs[position], batch)
            if position >= len(request.samples) - request.padding:
                sample.info = {**sample.info, "padding": True}
            batch.samples.append(sample)
        return batch

    def _read(self, number: int) -> Conversation:
        shards, at = self.samples[number]
        sample = shards.read(at, self.bounds)
        with shards.naming(at):
            if self.vision:
                add_visuals(sample, self.vision)
            return sample.check(targets=self.targets)

    def _good(self, number: int, epoch: int, batch: Batch) -> Conversation:
        """The sample or, if it is bad, the first good one of `_reserves`."""
        tried, others = number, self._reserves(number, epoch)
        bad: list[BadSample] = []
        while True:
            try:
                sample = self._read(tried)
            except BadSample as error:
                bad.append(error)
                if len(bad) == MOST_IN_A_ROW:
                    what = f"{MOST_IN_A_ROW} bad samples in a row, the last one here"
                    why = f"the first: {bad[0].where}, {bad[0].what}"
                    raise DataError(what, where=error.where, why=why, fix="prepare the shards again") from error
                if (following := next(others, None)) is None:
                    raise
                tried = following
            else:
                batch.bad += [_row(error) | {"epoch": epoch, "replaced_by": sample.key} for error in bad]
                return sample

    def _reserves(self, number: int, epoch: int) -> Iterator[int]:
        """Samples of the same source and task as they take its place: an order of (seed, epoch, sample) alone."""
        assert self.seed is not None
        source = bisect_right(self.spans, number, key=lambda span: span.first) - 1
        task = self._task(number)
        if (source, task) not in self._alike:
            span = self.spans[source]
            here = range(span.first, span.first + sum(span.shards))
            self._alike[source, task] = np.asarray([other for other in here if self._task(other) == task])
        alike = self._alike[source, task]
        if self.tokens is not None:
            alike = alike[self.tokens[alike] <= self.tokens[number]]
        for at in permutation(self.seed, epoch, len(alike), number):
            if alike[at] != number:
                yield int(alike[at])

    def _task(self, number: int) -> str:
        shards, at = self.samples[number]
        return get_task(shards.entries[at].task).name


def _row(error: BadSample) -> dict[str, Any]:
    place = {"shard": error.shard, "key": error.key, "member": error.member, "offset": error.offset}
    return place | {"reason": re.sub(r"\d+", "N", error.what), "why": error.why}  # reasons are counted


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

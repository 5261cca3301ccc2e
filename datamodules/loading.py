"""What runs in worker processes: samples are read there, and an error comes back as it was.

Lightning is not imported here, which makes workers start twice as fast.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from bernini.conversation import Batch, Conversation
from bernini.errors import BerniniError, ConfigError, DataError
from bernini.planner.vision import VisionConfig, add_visuals
from bernini.tasks import get_task
from datamodules.buckets import Bounds
from datamodules.order import Request, permutation
from datamodules.shards import Shards

BAD_SAMPLES = "bad_samples.jsonl"
MOST_IN_A_ROW = 100


class Clips(Dataset[Batch]):
    """Samples of one split; what is asked for comes as one batch.

    Args:
        folders: Folders of shards.
        tasks: Tasks to keep; ``None`` keeps all.
        limit: Most samples; the first ones are kept.
        targets: Whether every sample must have a target.
        bounds: What is taken of raw images and clips.
        vision: Make what a planner with these numbers sees, too; null for nothing.
        seed: Seed of the order in which other samples take the place of bad ones; null has their errors raised.

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
        seed: int | None = None,
    ) -> None:
        self.shards = [Shards(folder) for folder in folders]
        kept = None if tasks is None else {get_task(name).name for name in tasks}
        every = [(s, n, get_task(e.task).name) for s in self.shards for n, e in enumerate(s.entries)]
        self.samples = [(s, n, task) for s, n, task in every if kept is None or task in kept][:limit]
        self._alike: dict[str, np.ndarray] = {}
        here = sorted({task for *_, task in every})
        if missing := sorted((kept or set()) - set(here)):
            raise ConfigError(
                f"no sample of task {missing[0]}", where=", ".join(folders), why=f"the shards hold {', '.join(here)}"
            )
        self.targets, self.bounds, self.vision, self.seed = targets, bounds, vision, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, request: Request) -> Batch:
        batch = Batch([], request.cursor)
        for position, number in enumerate(request.samples):
            sample = self._read(number) if self.seed is None else self._good(number, batch)
            if position >= len(request.samples) - request.padding:
                sample.info = {**sample.info, "padding": True}
            batch.samples.append(sample)
        return batch

    def _read(self, number: int) -> Conversation:
        shards, at, _ = self.samples[number]
        sample = shards.read(at, self.bounds)
        if self.vision:
            add_visuals(sample, self.vision)
        return sample.check(targets=self.targets)

    def _good(self, number: int, batch: Batch) -> Conversation:
        """The sample or, if it is bad, the first good one of `reserves`."""
        epoch, tried = batch.cursor["epoch"], number
        others = self._reserves(number, epoch)
        bad: list[dict[str, Any]] = []
        while True:
            try:
                sample = self._read(tried)
            except DataError as error:
                bad.append(self._row(tried, error) | {"epoch": epoch})
                if len(bad) == MOST_IN_A_ROW:
                    why = f"the first: {bad[0]['shard']}:{bad[0]['key']}, {bad[0]['reason']}"
                    what = f"{MOST_IN_A_ROW} bad samples in a row, the last one here"
                    raise DataError(what, where=error.where, why=why, fix="prepare the shards again") from error
                if (following := next(others, None)) is None:
                    raise
                tried = following
            else:
                batch.bad += [row | {"replaced_by": sample.key} for row in bad]
                return sample

    def _reserves(self, number: int, epoch: int) -> Iterator[int]:
        """Samples of the same task in the order in which they take its place: one of (seed, epoch, sample) alone."""
        assert self.seed is not None
        task = self.samples[number][2]
        if task not in self._alike:
            self._alike[task] = np.flatnonzero([task == other for *_, other in self.samples])
        alike = self._alike[task]
        for at in permutation(self.seed, epoch, len(alike), number):
            if alike[at] != number:
                yield int(alike[at])

    def _row(self, number: int, error: DataError) -> dict[str, Any]:
        shards, at, _ = self.samples[number]
        entry = shards.entries[at]
        found = [name for name in entry.members if error.where.endswith(f"{entry.key}.{name}")]
        return {
            "shard": str(shards.folder / entry.shard),
            "key": entry.key,
            "member": found[0] if found else None,
            "offset": entry.members[found[0]][0] if found else None,
            "reason": re.sub(r"\d+", "N", error.what),  # reasons are counted
            "why": error.why,
        }


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

"""A folder of shards in the making, and how a run that was broken off goes on.

``.prepare.json`` says what the run makes, ``.prepare/`` what it has made; both go when the index is there, which comes
last. Every file is written under another name, synced and renamed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bernini.errors import ConfigError, DataError
from bernini.files import write_text
from datamodules.index import INDEX, Shard, index_text, parse_index
from datamodules.loading import BAD_SAMPLES
from datamodules.preparing import MADE, Job, Sample
from datamodules.storage import Local, StorageConfig

PLAN = ".prepare.json"


class Run:
    """A folder of shards in the making, which a run that was broken off has left or which is new.

    Args:
        root: Local folder.
        plan: All that the shards depend on but the samples, plain JSON.
        samples: All samples.
        samples_per_shard: Samples that a shard is made of.

    Raises:
        ConfigError: The folder is not local, is finished, or holds shards of another plan.
        DataError: Two samples have one key.
    """

    def __init__(
        self, root: str | Path, plan: Mapping[str, Any], samples: Sequence[Sample], samples_per_shard: int
    ) -> None:
        self.local = Local(root, StorageConfig())
        self.root = self.local.root
        places: dict[str, str] = {}
        for sample in samples:
            if (other := places.setdefault(sample.key, sample.where)) != sample.where:
                what, why = f"the key {sample.key!r} comes twice", "keys are unique in a data set"
                raise DataError(what, where=f"{sample.where}; {other}", why=why, fix="rename the sample")
        digest = hashlib.sha256("\n".join(sample.identity for sample in samples).encode()).hexdigest()
        self.plan = json.loads(json.dumps({**plan, "samples_per_shard": samples_per_shard, "input": digest}))
        starts = range(0, len(samples), samples_per_shard)
        self.jobs = [Job(n, samples[at : at + samples_per_shard]) for n, at in enumerate(starts)]
        self._begin()

    @property
    def _finished(self) -> bool:
        return (self.root / INDEX).exists()

    def _report(self, name: str) -> Path:
        """What is written of a shard when it is complete."""
        return self.root / MADE / f"{name}.json"

    def _begin(self) -> None:
        if (self.root / PLAN).exists():
            before = json.loads((self.root / PLAN).read_text())
            other = sorted(key for key, value in self.plan.items() if before.get(key) != value)
            if other and (self._finished or any((self.root / MADE).glob("shard-*.json"))):
                raise ConfigError(
                    "the folder holds shards of another run, which has not ended", where=str(self.root),
                    why=f"it differs in {', '.join(other)}", fix="name another folder, or delete this one",
                )  # fmt: skip
        elif self.local.names() or self._finished:
            what = "the folder already holds shards"
            raise ConfigError(what, where=str(self.root), fix="name another folder or delete it")
        write_text(self.root / PLAN, json.dumps(self.plan, indent=2))
        for left in [*self.root.glob(".*.tmp.*"), *(self.root / MADE).glob(".*.tmp.*")]:
            left.unlink()
        for name in () if self._finished else self.local.names():
            if not self._report(Path(name).stem).exists():
                (self.root / name).unlink()

    @property
    def left(self) -> list[Job]:
        """Jobs that have not been done."""
        return [] if self._finished else [job for job in self.jobs if not self._report(job.name).exists()]

    def finish(self, write_more: Callable[[set[str]], None]) -> int:
        """Write the list of bad samples, what ``write_more`` writes, and last the index.

        Args:
            write_more: Is called with the tasks of the samples.

        Returns:
            The number of bad samples.

        Raises:
            DataError: There is no sample.
        """
        bad: list[dict[str, str]] = []
        shards: list[Shard] = []
        if not self._finished:
            for path in (self._report(job.name) for job in self.jobs):
                made = json.loads(path.read_text())
                bad += made["bad"]
                shards += parse_index(made["index"], str(path)).shards
            (self.root / BAD_SAMPLES).unlink(missing_ok=True)
            if bad:
                write_text(self.root / BAD_SAMPLES, "".join(json.dumps(row) + "\n" for row in bad))
            if not shards:
                raise DataError("there is no sample to write", where=str(self.root), fix="check the input")
            write_more({entry.task for shard in shards for entry in shard.entries})
            write_text(self.root / INDEX, index_text(shards))
        shutil.rmtree(self.root / MADE, ignore_errors=True)
        (self.root / PLAN).unlink()
        return len(bad)

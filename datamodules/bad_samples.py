"""Samples that cannot be read: where they are written down, and when there are too many."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from bernini.conversation import Batch
from bernini.errors import DataError
from datamodules.loading import BAD_SAMPLES


class WatchBadSamples(Callback):
    """Writes bad samples down as they are trained past, counts them, and stops a run that meets too many.

    A line of ``bad_samples.jsonl`` in ``trainer.default_root_dir`` has what a `bernini.errors.BadSample` says, with
    ``reason``, ``why``, ``epoch``, ``replaced_by``, ``step`` and the data-parallel ``rank``. All ranks add to the file,
    and each reads what the others added: no rank waits for another. The counts since the run began are logged as
    ``data/bad/REASON``.

    Args:
        share: Largest share of bad samples.
        least: A run with fewer bad samples than this goes on whatever their share is.
    """

    def __init__(self, share: float, least: int = 10) -> None:
        self.share, self.least = share, least
        self.counts: Counter[str] = Counter()
        self.seen = 0
        self._read_to = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the lines of earlier runs out of account."""
        path = _journal(trainer)
        self.counts.clear()
        self.seen, self._read_to = 0, path.stat().st_size if path.is_file() else 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Write, count and log.

        Raises:
            DataError: There are too many.
        """
        sampler = trainer.distributed_sampler_kwargs or {}
        rank, world = sampler.get("rank", 0), sampler.get("num_replicas", 1)
        self.seen += world * len(batch.samples)
        path = _journal(trainer)
        if batch.bad and trainer.global_rank % max(1, trainer.world_size // world) == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            more = {"step": trainer.global_step, "rank": rank}
            with path.open("ab", buffering=0) as file:  # one write, so that lines of two ranks do not mix
                file.write("".join(json.dumps({**row, **more}) + "\n" for row in batch.bad).encode())
        if path.is_file() and path.stat().st_size > self._read_to:
            self.counts.update(row["reason"] for row in self._new_rows(path))
            self._check(path)
        for reason, count in self.counts.items():
            pl_module.log(f"data/bad/{reason}", float(count), batch_size=1, rank_zero_only=True)

    def _new_rows(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read_to += len(line)
                yield json.loads(line)

    def _check(self, path: Path) -> None:
        bad = self.counts.total()
        if bad >= self.least and bad > self.share * self.seen:
            reason, count = self.counts.most_common(1)[0]
            raise DataError(
                f"{bad} of {self.seen} samples were bad, more than {self.share:.3%}",
                where=str(path),
                why=f"{count} of them: {reason}",
                fix="copy or prepare their shards again, or raise data.init_args.max_bad_share",
            )


def _journal(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / BAD_SAMPLES

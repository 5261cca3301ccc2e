"""What data modules of an ordered, resumable data set share: the cursor and who moves it, ranks, loaders.

The cursor is what a checkpoint knows of the data: less than 1 KB of JSON, whatever the size of the data set.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset, DistributedSampler

from bernini.conversation import Batch
from bernini.errors import ConfigError
from datamodules.loading import ErrorsAsValues, Loader
from datamodules.order import Order, Request, train_requests

CURSOR_VERSION = 1


class Requests(DistributedSampler[Any]):
    """A sampler that Lightning leaves alone, because it already divides the data between ranks.

    Args:
        make: Gives the requests of one pass, each time anew.
        length: Number of requests of a whole epoch.
    """

    def __init__(self, make: Callable[[], Iterable[Any]], length: int) -> None:
        self.make, self.length = make, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return iter(self.make())

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the epoch is part of the cursor, which also knows about resumed runs."""


class CommitCursor(Callback):
    """Moves the data order on when an optimizer step is done: not when a batch is fetched, and not between steps.

    Args:
        data: Data module whose cursor moves.
    """

    def __init__(self, data: "OrderedDataModule") -> None:
        self.data = data
        self.step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where the run begins, and have Lightning count what this epoch has had in batches of this run.

        It decides by that count which batch completes an optimizer step. A run on fewer ranks that accumulates more has
        more batches for the same samples.
        """
        self.step = trainer.global_step
        done = trainer.fit_loop.epoch_loop.batch_progress.current
        more = self.data.in_batches_of_this_run(done.ready) - done.ready
        for name in ("ready", "started", "processed", "completed"):
            setattr(done, name, getattr(done, name) + more)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Commit the batch's cursor; the module's own hook would be too late, as checkpoints are written before it."""
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self.data.commit(batch.cursor)
            pl_module.log_dict(self.data.measures(), on_step=True, on_epoch=False)


class OrderedDataModule(L.LightningDataModule):
    """A data module whose training order goes on from a cursor.

    The cursor is read whenever the training loader is iterated, and moved by `CommitCursor`. Lightning's look-ahead and
    the workers' prefetching therefore do not shift it, and it is all that a checkpoint has to hold.

    Args:
        workers: Worker processes per rank; 0 reads in the main process.
        start_method: How workers are started; ``None`` takes Python's default.

    Attributes:
        cursor: ``epoch`` and ``sample``, the global samples that optimizer steps have used of it.
    """

    def __init__(self, workers: int, start_method: Literal["fork", "spawn", "forkserver"] | None = None) -> None:
        super().__init__()
        self.workers, self.start_method = workers, start_method
        self.cursor = {"epoch": 0, "sample": 0}
        self.batch = 0  # samples of all ranks in a batch, known when training begins
        self._resumed: dict[str, Any] | None = None

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch, unless the module does so itself."""
        if getattr(self.trainer.lightning_module, "moves_batches", False):  # type: ignore[union-attr]
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def setup(self, stage: str) -> None:
        """Have the cursor moved by training."""
        callbacks: list[Callback] = getattr(self.trainer, "callbacks", [])
        if stage == "fit" and not any(isinstance(callback, CommitCursor) for callback in callbacks):
            callbacks.insert(0, CommitCursor(self))  # before anything that writes checkpoints

    def commit(self, cursor: dict[str, int]) -> None:
        """Take ``cursor`` as the place from which training goes on: in the next epoch, or after a restart."""
        self.cursor = dict(cursor)

    def identity(self) -> dict[str, Any]:
        """What the cursor is a place in; a run in which it is another one cannot go on from the checkpoint."""
        return {"version": CURSOR_VERSION}

    def measures(self) -> dict[str, float]:
        """What there is to log of the order, now that the cursor has moved."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Cursor of the training order, what it is a place in, and the size of the batches that led there."""
        return {**self.cursor, **self.identity(), "batch": self.batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved cursor; whether it fits the data is looked at when training begins."""
        self.commit({name: state_dict.get(name, 0) for name in self.cursor})
        self._resumed = state_dict

    def in_batches_of_this_run(self, batches: int) -> int:
        """How many batches of this run hold what ``batches`` of the run that wrote the checkpoint held."""
        if self._resumed is None or not self.batch:
            return batches
        return batches * self._resumed["batch"] // self.batch

    def check_resumed(self) -> None:
        """See whether the checkpoint's cursor is a place in this order.

        Raises:
            ConfigError: It is one in another.
        """
        if self._resumed is None:
            return
        pairs = {name: (self._resumed.get(name), now) for name, now in self.identity().items()}
        if unlike := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
            raise ConfigError(
                "the checkpoint is of other training data: "
                + "; ".join(f"{name} {was} there, {now} here" for name, (was, now) in unlike.items()),
                where="data.init_args",
                why="going on in the middle of another order would repeat and leave out samples",
                fix="resume with the same data, seed and mix, or start anew from the weights (init_from)",
            )

    def rank_and_world(self) -> tuple[int, int]:
        """Data-parallel rank and size as the strategy gives them: the ranks of a model-parallel group share batches."""
        kwargs = (self.trainer and self.trainer.distributed_sampler_kwargs) or {}
        return kwargs.get("rank", 0), kwargs.get("num_replicas", 1)

    def accumulated(self) -> int:
        """Batches of an optimizer step."""
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    def train_loader(self, dataset: Dataset[Any], order: Order, size: int, batch_size: int, seed: int) -> Loader:
        """Training batches from the cursor to the end of its epoch.

        An epoch is as many optimizer steps as ``size`` samples fill; what is left begins the next one.

        Args:
            dataset: Turns a request into a batch.
            order: Order of the samples.
            size: Samples of an epoch.
            batch_size: Samples per rank.
            seed: Seed of the workers.

        Raises:
            ConfigError: There are fewer samples than an optimizer step takes, or the checkpoint is of other data.
        """
        rank, world = self.rank_and_world()
        batches = self.accumulated()
        self.batch = batch_size * world
        step = self.batch * batches
        if size < step:
            raise ConfigError(
                f"{size} training samples, but a global batch takes {step}",
                where="data.init_args.batch_size",
                why=f"{world} rank(s) take {batch_size} each, {batches} time(s) a step",
                fix="use more samples or smaller batches",
            )
        self.check_resumed()
        length = size // step * batches
        rank_zero_info(
            f"{size} training samples: {length} batches an epoch; {size % step} left over begin the next one"
        )

        def requests() -> Iterator[Request]:
            return train_requests(order, self.cursor, size, length, batch_size, rank, world)

        return self.loader(dataset, requests, length, seed)

    def loader(self, dataset: Dataset[Any], make: Callable[[], Iterable[Request]], length: int, seed: int) -> Loader:
        """A loader of batches.

        Args:
            dataset: Turns a request into a batch, or whatever else is to come of it.
            make: Gives the requests of one pass, each time anew.
            length: Number of requests of a whole epoch.
            seed: Seed of the workers, so that they leave the global generator to the model.
        """
        return Loader(
            ErrorsAsValues(dataset),
            sampler=Requests(make, length),
            batch_size=None,
            num_workers=self.workers,
            multiprocessing_context=self.start_method if self.workers else None,
            generator=torch.Generator().manual_seed(seed),
        )

"""What data modules of an ordered, resumable data set share: the cursor and who moves it, ranks, loaders."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import Dataset, DistributedSampler

from bernini.conversation import Batch
from datamodules.loading import ErrorsAsValues, Loader
from datamodules.order import Request


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
        """Note where the run begins."""
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Commit the batch's cursor; the module's own hook would be too late, as checkpoints are written before it."""
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self.data.commit(batch.cursor)


class OrderedDataModule(L.LightningDataModule):
    """A data module whose training order goes on from a cursor.

    The cursor is read whenever the training loader is iterated, and moved by `CommitCursor`. Lightning's look-ahead and
    the workers' prefetching therefore do not shift it, and it is all that a checkpoint has to hold.

    Args:
        workers: Worker processes per rank; 0 reads in the main process.
        start_method: How workers are started; ``None`` takes Python's default.

    Attributes:
        cursor: ``epoch`` and ``sample``, the global samples seen in it.
    """

    def __init__(self, workers: int, start_method: Literal["fork", "spawn", "forkserver"] | None = None) -> None:
        super().__init__()
        self.workers, self.start_method = workers, start_method
        self.cursor = {"epoch": 0, "sample": 0}

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

    def state_dict(self) -> dict[str, Any]:
        """Cursor of the training order."""
        return dict(self.cursor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved cursor."""
        self.commit({name: state_dict[name] for name in ("epoch", "sample")})

    def rank_and_world(self) -> tuple[int, int]:
        """Data-parallel rank and size as the strategy gives them: the ranks of a model-parallel group share batches."""
        kwargs = (self.trainer and self.trainer.distributed_sampler_kwargs) or {}
        return kwargs.get("rank", 0), kwargs.get("num_replicas", 1)

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

"""Losses of samples under keyed randomness, gathered as means over all samples of all ranks."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from bernini.conversation import Batch, Conversation
from bernini.means import MeanTable
from bernini.optimizing import ConfiguredOptimizer
from bernini.seeds import draw_seed
from bernini.sharding import data_rank


class Measured(ConfiguredOptimizer):
    """A module that trains on the losses of conversations, and logs their means.

    Attributes:
        seed: Seed of all that is drawn in training and validation.
    """

    seed: int

    @abstractmethod
    def losses(
        self, samples: Sequence[Conversation], keys: Sequence[tuple[str | int, ...]], train: bool = True
    ) -> tuple[Tensor, MeanTable]:
        """The loss of samples whose randomness depends on their keys and the seed, and means of its parts.

        The mean of the loss over ranks is that of all their samples in one batch, and so with its gradients.
        """

    @abstractmethod
    def empty_table(self) -> MeanTable:
        """A table for what `losses` measures."""

    def on_train_start(self) -> None:
        """Begin to gather losses, too."""
        super().on_train_start()
        self._trained = self.empty_table()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One packed forward.

        Draws depend on a sample's place in the optimizer step, and its targets weigh as all others of the step, so
        that neither depends on the number of ranks.
        """
        first = batch.place
        if first is None:
            rank, ranks = data_rank(self)
            first = (batch_idx % self.trainer.accumulate_grad_batches * ranks + rank) * len(batch)
        key = ("train", self.global_step, 0)  # 0: the draws of runs that were begun when batches of a step had a number
        torch.manual_seed(draw_seed(self.seed, *key, first))  # for what layers draw themselves, as a LoRA's dropout
        loss, table = self.losses(batch.samples, [(*key, first + i) for i in range(len(batch))])
        self._trained += table
        shown = table.means().get("loss", loss.detach())
        self.log("train/loss", shown, prog_bar=True, logger=False, batch_size=len(batch))
        return batch.weight * loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Every ``log_every_n_steps`` steps, log means over all samples of all ranks since the last time.

        The loggers get ``train/loss`` and its parts from here: Lightning would log one rank's last step, and repeat the
        last loss of a task that has not come up since.
        """
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            means = {f"train/{name}": value.item() for name, value in self._trained_means().items()}
            for logger in self.loggers:
                logger.log_metrics({**means, "epoch": self.current_epoch}, self.global_step)
                logger.save()

    def _trained_means(self) -> dict[str, Tensor]:
        """Mean losses of training since the last call, of all ranks."""
        table, self._trained = self._trained, self.empty_table()
        return self._means(table)

    def on_validation_epoch_start(self) -> None:
        """Begin to gather."""
        self._measured = self.empty_table()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The losses, under randomness that is the same at every validation."""
        self._measured += self.losses(batch.samples, [("validate", s.key) for s in batch.samples], train=False)[1]

    def on_validation_epoch_end(self) -> None:
        """Log means over all samples of all ranks: ``val/loss``, or ``test/loss``, and its parts."""
        stage = "test" if self.trainer.testing else "val"
        self.log_dict({f"{stage}/{name}": value for name, value in self._found().items()}, sync_dist=True)

    def _found(self) -> dict[str, Tensor]:
        """What a validation has found."""
        return self._means(self._measured)

    def _means(self, table: MeanTable) -> dict[str, Tensor]:
        """Means over all ranks."""
        return table.over_ranks(self.trainer.strategy).means()

    def on_test_epoch_start(self) -> None:
        """As in validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self.on_validation_epoch_end()

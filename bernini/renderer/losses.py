"""Losses of targets by task and by noise level."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bernini.means import MeanTable
from bernini.renderer.latents import NoisedSample
from bernini.tasks import TASKS

SIGMA_BUCKETS = 4


def loss_names(loss: str = "loss") -> list[str]:
    """Mean losses: in all, per task and per quarter of the noise levels, e.g. ``loss_sigma_0.75``."""
    buckets = [f"{loss}_sigma_{bucket / SIGMA_BUCKETS:.2f}" for bucket in range(SIGMA_BUCKETS)]
    return [loss, *(f"{loss}_{task}" for task in TASKS), *buckets]


def loss_table(device: torch.device | str) -> MeanTable:
    """A table of the means of `loss_names`."""
    return MeanTable(loss_names(), device)


def add_losses(table: MeanTable, noised: Sequence[NoisedSample], losses: Tensor, loss: str = "loss") -> None:
    """Add the losses ``[targets]`` of some samples, except of padding, to a table with the names of a loss."""
    table.add(losses, [_rows(sample, loss) for sample in noised for _ in sample.velocity])


def _rows(sample: NoisedSample, loss: str) -> tuple[str, ...]:
    if sample.padding:
        return ()
    bucket = min(int(sample.sigma * SIGMA_BUCKETS), SIGMA_BUCKETS - 1)
    return loss, f"{loss}_{sample.task}", f"{loss}_sigma_{bucket / SIGMA_BUCKETS:.2f}"

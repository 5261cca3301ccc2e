"""Losses of targets by task and by noise level."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bernini.means import MeanTable
from bernini.renderer.latents import NoisedSample
from bernini.tasks import TASKS

SIGMA_BUCKETS = 4
_NAMES = ["loss", *(f"loss_{t}" for t in TASKS), *(f"loss_sigma_{b / SIGMA_BUCKETS:.2f}" for b in range(SIGMA_BUCKETS))]


def loss_table(device: torch.device | str) -> MeanTable:
    """A table of mean losses: in all, per task and per quarter of the noise levels, e.g. ``loss_sigma_0.75``."""
    return MeanTable(_NAMES, device)


def add_losses(table: MeanTable, noised: Sequence[NoisedSample], losses: Tensor) -> None:
    """Add the losses ``[targets]`` of some samples, except of padding."""
    table.add(losses, [_rows(sample) for sample in noised for _ in sample.velocity])


def _rows(sample: NoisedSample) -> tuple[str, ...]:
    if sample.padding:
        return ()
    bucket = min(int(sample.sigma * SIGMA_BUCKETS), SIGMA_BUCKETS - 1)
    return "loss", f"loss_{sample.task}", f"loss_sigma_{bucket / SIGMA_BUCKETS:.2f}"

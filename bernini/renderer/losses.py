"""Losses of targets by task and by noise level."""

from collections.abc import Sequence

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from bernini.renderer.latents import NoisedSample
from bernini.tasks import TASKS

SIGMA_BUCKETS = 4
_NAMES = ["loss", *(f"loss_{t}" for t in TASKS), *(f"loss_sigma_{b / SIGMA_BUCKETS:.2f}" for b in range(SIGMA_BUCKETS))]
_ROWS = {name: row for row, name in enumerate(_NAMES)}


class LossTable:
    """Sums of losses and numbers of targets: in all, per task and per quarter of the noise levels.

    Every rank has the same rows whatever its samples, so that tables of ranks can be added.

    Args:
        device: Where sums are kept; numbers of targets are on the CPU, so that asking for means waits for no GPU.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.sums, self.counts = torch.zeros(len(_NAMES), device=device), torch.zeros(len(_NAMES))

    def add(self, noised: Sequence[NoisedSample], losses: Tensor) -> None:
        """Add the losses ``[targets]`` of some samples, except of padding."""
        targets = [sample for sample in noised for _ in sample.velocity]
        belongs = torch.zeros(len(_NAMES), len(targets))
        for column, sample in enumerate(targets):
            if sample.padding:
                continue
            bucket = min(int(sample.sigma * SIGMA_BUCKETS), SIGMA_BUCKETS - 1)
            for name in ("loss", f"loss_{sample.task}", f"loss_sigma_{bucket / SIGMA_BUCKETS:.2f}"):
                belongs[_ROWS[name], column] = 1
        self.sums += belongs.to(losses.device, non_blocking=True) @ losses
        self.counts += belongs.sum(1)

    def __iadd__(self, other: "LossTable") -> "LossTable":
        self.sums += other.sums
        self.counts += other.counts
        return self

    def over_ranks(self, strategy: Strategy) -> "LossTable":
        """The sum of all ranks' tables."""
        whole = LossTable(self.sums.device)
        both = torch.stack([self.sums, self.counts.to(self.sums.device)])
        whole.sums, counts = strategy.reduce(both, reduce_op="sum")
        whole.counts = counts.cpu()
        return whole

    def means(self) -> dict[str, Tensor]:
        """Mean loss over the targets of each row that has any: ``loss``, ``loss_v2v``, ``loss_sigma_0.75``..."""
        return {name: self.sums[row] / self.counts[row].item() for name, row in _ROWS.items() if self.counts[row]}

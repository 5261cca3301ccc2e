"""Means of what samples measure, under names that every rank has."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor


class MeanTable:
    """Sums and counts by name.

    Every rank has the same rows whatever its samples, so that tables of ranks can be added.

    Args:
        names: The rows.
        device: Where sums are kept; counts are on the CPU, so that asking for means waits for no GPU.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str) -> None:
        self.names = names
        self._rows = {name: row for row, name in enumerate(names)}
        self.sums, self.counts = torch.zeros(len(names), device=device), torch.zeros(len(names))

    def add(self, values: Tensor, names: Sequence[Iterable[str]], counts: Sequence[int] | None = None) -> None:
        """Add measured values.

        Args:
            values: ``[n]`` fp32, without a gradient.
            names: Rows that each of them belongs to; none if it does not count.
            counts: How many measurements each value is the sum of; one if null.
        """
        belongs = torch.zeros(len(self.names), len(values))
        for column, own in enumerate(names):
            for name in own:
                belongs[self._rows[name], column] = 1
        self.sums += belongs.to(values.device, non_blocking=True) @ values
        self.counts += belongs.sum(1) if counts is None else belongs @ torch.tensor(counts, dtype=torch.float32)

    def __iadd__(self, other: "MeanTable") -> "MeanTable":
        self.sums += other.sums
        self.counts += other.counts
        return self

    def over_ranks(self, strategy: Strategy) -> "MeanTable":
        """The sum of all ranks' tables."""
        whole = MeanTable(self.names, self.sums.device)
        both = torch.stack([self.sums, self.counts.to(self.sums.device)])
        whole.sums, counts = strategy.reduce(both, reduce_op="sum")
        whole.counts = counts.cpu()
        return whole

    def means(self) -> dict[str, Tensor]:
        """Mean of each row that has any value."""
        return {name: self.sums[row] / self.counts[row].item() for name, row in self._rows.items() if self.counts[row]}


def mean_over_ranks(counts: Sequence[int], device: torch.device | str) -> Tensor:
    """Counts ``[n]`` fp32 of an average rank; with several ranks all have to call.

    What a rank sums up, divided by this, has the mean over all ranks' values as its mean over ranks.
    """
    found = torch.tensor(counts, device=device, dtype=torch.float32)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(found)
        found /= dist.get_world_size()
    return found

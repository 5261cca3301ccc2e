"""Scores gathered over ranks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from benchmarks.quality.interface import Benchmark, Cell, Item, without


class Records(Metric):
    """Single scores of items, kept until the end: any number of ranks gives the same table to the bit.

    An item that several ranks scored, because one of them was to be kept busy, counts once. With several ranks each has
    to call ``update``, if with nothing.

    Args:
        benchmark: Makes the table.
        items: What is to be scored, the same on all ranks.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, benchmark: Benchmark, items: Sequence[Item]) -> None:
        super().__init__()
        self.benchmark, self.items = benchmark, list(items)
        self._ids = {item.id: number for number, item in enumerate(self.items)}
        self._names = {name: number for number, name in enumerate(benchmark.metrics)}
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, scores: Sequence[tuple[str, str, float | None]]) -> None:
        """Add scores.

        Args:
            scores: Item id, name of the score, value; none where the score does not exist for the item.
        """
        rows = [
            (self._ids[one], self._names[name], math.nan if value is None else value) for one, name, value in scores
        ]
        self.rows.append(torch.tensor(rows, dtype=torch.float64, device=self.device).reshape(-1, 3))

    def compute(self) -> list[Cell]:
        """The benchmark's table over the scores of all ranks: value, interval, items scored and items asked for."""
        names = list(self._names)
        rows: list[list[float]] = dim_zero_cat(self.rows).tolist() if len(self.rows) else []
        values = {(self.items[int(one)].id, names[int(name)]): value for one, name, value in rows}
        void = {key for key, value in values.items() if math.isnan(value)}
        return self.benchmark.aggregate(without(self.items, void), values)

"""Scores of items by name, checked whole before anything is averaged: what all totals are made from."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from bernini.errors import DataError

Records = Mapping[str, Mapping[str, float | None]]
"""Scores by item id and name; none says that by its definition a score does not exist for an item."""


class Facts(NamedTuple):
    """What totals have to know of an item besides its scores.

    Attributes:
        scores: Names of the scores that it has to have, no more and no fewer.
        category: Kind that it is averaged with; empty where a benchmark has none.
        frames: Frames of its output, where long outputs weigh more; 0 where they do not.
    """

    scores: tuple[str, ...]
    category: str = ""
    frames: int = 0


class Range(NamedTuple):
    """What a score may be.

    Attributes:
        low: Least value.
        high: Largest value.
        optional: Whether it may not exist for an item (no face is seen, nothing lies outside a mask), or not be asked.
    """

    low: float = -math.inf
    high: float = math.inf
    optional: bool = False


class Figure(NamedTuple):
    """One figure of a table.

    Attributes:
        value: The figure, in the units in which the benchmark's own tables print it.
        n: Items that it is a mean over; of a total, the fewest of any of its parts.
    """

    value: float
    n: int


Totals = dict[str, Figure]
"""Figures by the name of their column."""

Compute = Callable[[Records, Mapping[str, Facts]], Totals]
"""From scores to figures; raises DataError where a score is missing."""

SHARE = Range(0, 1)


class Scores:
    """The scores of all items of a benchmark, of which none is missing, unknown, out of range or not a number.

    Args:
        records: The scores.
        facts: All items by id, in any order.
        ranges: What each score of the benchmark may be, by its name.
        drop_missing: Let what is missing lower ``n`` in silence, as some official scripts do.
        each_all: Whether each item has to be asked for all scores that are not optional.

    Raises:
        DataError: A score is missing or not as it has to be, or a record is of no item.
    """

    def __init__(
        self,
        records: Records,
        facts: Mapping[str, Facts],
        ranges: Mapping[str, Range],
        *,
        drop_missing: bool = False,
        each_all: bool = True,
    ) -> None:
        if strangers := sorted(records.keys() - facts.keys()):
            raise DataError(f"there are scores of {strangers[0]!r}, which is no item", fix="leave its record out")
        self.facts, self._values = facts, dict[tuple[str, str], float]()
        self._names = ranges.keys()
        needed = [name for name, allowed in ranges.items() if each_all and not allowed.optional]
        for one, fact in facts.items():
            record = records.get(one, {})
            if unasked := [name for name in needed if name not in fact.scores]:
                raise DataError(f"item {one!r} is not asked for {unasked[0]!r}", why="every item has to have it")
            for name in (*fact.scores, *(record.keys() - set(fact.scores))):
                if name not in fact.scores or name not in ranges:
                    raise _wrong(one, name, "is unknown", f"it has {', '.join(fact.scores)}")
                if name in record:
                    self._add(one, name, record[name], ranges[name], drop_missing)
                elif not drop_missing:
                    raise _wrong(one, name, "is missing", "a mean over the other items would be another figure")

    def _add(self, one: str, name: str, value: float | None, allowed: Range, drop_missing: bool) -> None:
        if value is None:
            if not (allowed.optional or drop_missing):
                raise _wrong(one, name, "is none", "it exists for every item")
        elif not allowed.low <= value <= allowed.high:  # false of nan, too
            raise _wrong(one, name, f"is {value}", f"it lies in [{allowed.low:g}, {allowed.high:g}]")
        else:
            self._values[one, name] = float(value)

    def rows(self, names: Sequence[str], category: str | None = None) -> dict[str, dict[str, float]]:
        """Items that have all of some scores, by id.

        Args:
            names: The scores.
            category: Of this category only.
        """
        if unknown := [name for name in names if name not in self._names]:
            raise KeyError(unknown[0])
        return {
            one: {name: self._values[one, name] for name in names}
            for one, fact in self.facts.items()
            if category in (None, fact.category) and all((one, name) in self._values for name in names)
        }

    def row(self, one: str) -> dict[str, float]:
        """All scores that an item has."""
        return {name: self._values[one, name] for name in self.facts[one].scores if (one, name) in self._values}

    def mean(self, name: str, category: str | None = None, weight: Callable[[Facts], float] | None = None) -> Figure:
        """Mean of one score over the items that have it.

        Args:
            name: The score.
            category: Over the items of this category only.
            weight: How much an item counts, by its frames; alike if left out.

        Raises:
            DataError: No item has it, or one that has it counts for nothing.
        """
        rows = self.rows((name,), category)
        weights = {one: weight(self.facts[one]) for one in rows} if weight else None
        for one, counts in (weights or {}).items():
            if counts <= 0:
                raise DataError(
                    f"item {one!r} counts for nothing in {name!r}", why=f"it has {self.facts[one].frames} frames"
                )
        what = f"{name} of {category}" if category else name
        return mean([row[name] for row in rows.values()], what, list(weights.values()) if weights else None)

    def check_categories(self, known: Collection[str]) -> None:
        """See that every item is of a known category.

        Raises:
            DataError: One is not.
        """
        for one, fact in self.facts.items():
            if fact.category not in known:
                raise DataError(f"item {one!r} is of category {fact.category!r}", fix=f"one of {', '.join(known)}")


def mean(values: Sequence[float], what: str, weights: Sequence[float] | None = None) -> Figure:
    """Mean of values, whatever their order, to the bit.

    Args:
        values: The values.
        what: What they are, for the error.
        weights: How much each counts; alike if left out.

    Raises:
        DataError: There are none.
    """
    if weights is None:
        weights = [1.0] * len(values)
    whole = math.fsum(weights)
    if not values:
        raise DataError(f"no item has {what}", why="a mean over nothing is no figure")
    return Figure(math.fsum(v * w for v, w in zip(values, weights, strict=True)) / whole, len(values))


def had(ranges: Mapping[str, Range], facts: Mapping[str, Facts]) -> dict[str, Range]:
    """Those of some scores that any item has."""
    names = {name for fact in facts.values() for name in fact.scores}
    return {name: allowed for name, allowed in ranges.items() if name in names}


def scaled(figure: Figure, factor: float) -> Figure:
    """A figure in other units."""
    return figure._replace(value=figure.value * factor)


def in_percent(compute: Compute) -> Compute:
    """The same figures in per cent."""
    return lambda records, facts: {name: scaled(figure, 100) for name, figure in compute(records, facts).items()}


def _wrong(one: str, name: str, what: str, why: str) -> DataError:
    return DataError(f"score {name!r} of item {one!r} {what}", why=why, fix="score the item again")

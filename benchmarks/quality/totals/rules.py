"""How one figure of a table follows from others: used on own scores and on published tables alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality.totals.records import Figure, Totals


@dataclass(frozen=True)
class Rule:
    """A figure that follows from others of the same row.

    Attributes:
        total: Column of the figure.
        parts: Columns that it follows from.
        compute: The figure from the values of the parts by column.
    """

    total: str
    parts: tuple[str, ...]
    compute: Callable[[Mapping[str, float]], float]


def weighted(total: str, weights: Mapping[str, float]) -> Rule:
    """The weighted mean of some columns, whatever the weights' sum."""
    whole = math.fsum(weights.values())
    return Rule(total, tuple(weights), lambda row: math.fsum(row[name] * w for name, w in weights.items()) / whole)


def plain(total: str, parts: Sequence[str]) -> Rule:
    """The mean of some columns, each of which counts alike."""
    return weighted(total, dict.fromkeys(parts, 1.0))


def with_totals(parts: Totals, rules: Sequence[Rule]) -> Totals:
    """A row with the figures that follow from it, totals first, the last rule's foremost."""
    figures = dict(parts)
    for rule in rules:
        value = rule.compute({name: figures[name].value for name in rule.parts})
        figures[rule.total] = Figure(value, min(figures[name].n for name in rule.parts))
    found = [rule.total for rule in reversed(rules)]
    return {name: figures[name] for name in (*found, *parts)}

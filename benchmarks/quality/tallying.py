"""Official figures of a run: from all its scores or not at all."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from benchmarks.quality.totals.records import Compute, Facts, Records, Totals
from bernini.errors import DataError


class Tally(NamedTuple):
    """Figures over some items of a benchmark.

    Attributes:
        title: What they are of.
        facts: The items, and the scores that each of them has to have.
        compute: The figures, from the scores; raises DataError where one is missing.
        published: Name that printed tables of the same figures have in the catalogue; empty where there are none.
        apart: Whether figures that are made of one score alone are there whatever the others lack.
    """

    title: str
    facts: Mapping[str, Facts]
    compute: Compute
    published: str = ""
    apart: bool = False


def tally(
    tallies: Sequence[Tally], values: Mapping[tuple[str, str], float | None], whole: bool
) -> list[dict[str, Any]]:
    """What a summary says of official figures.

    Args:
        tallies: What there is to compute.
        values: Score by item id and name; none where it does not exist for the item.
        whole: Whether the run has all items of the benchmark.

    Returns:
        For each: ``title``, ``published``, ``figures``, a list of ``figure``, ``value`` and ``n``, and ``why``,
        which is empty unless there are none.
    """
    found = []
    for one in tallies:
        records = {
            item: {name: values[item, name] for name in fact.scores if (item, name) in values}
            for item, fact in one.facts.items()
        }
        figures, why = _figures(one, records) if whole else ({}, "the run is of a part of the items")
        rows = [{"figure": name, "value": figure.value, "n": figure.n} for name, figure in figures.items()]
        found.append({"title": one.title, "published": one.published, "figures": rows, "why": why})
    return found


def _figures(one: Tally, records: Records) -> tuple[Totals, str]:
    """Figures, or why there are none."""
    try:
        return one.compute(records, one.facts), ""
    except DataError as error:
        why = error.what
    figures: Totals = {}
    for part in _apart(one) if one.apart else ():
        with suppress(DataError):  # the others stand alone
            figures |= one.compute({key: _only(records[key], fact.scores) for key, fact in part.items()}, part)
    return figures, "" if figures else why


def _apart(one: Tally) -> list[dict[str, Facts]]:
    """The items with one score at a time, of those that any of them has."""
    names = dict.fromkeys(name for fact in one.facts.values() for name in fact.scores)
    return [
        {key: fact._replace(scores=(name,)) for key, fact in one.facts.items() if name in fact.scores} for name in names
    ]


def _only(record: Mapping[str, float | None], names: Sequence[str]) -> dict[str, float | None]:
    return {name: record[name] for name in names if name in record}

"""A run's official figures beside those that others have printed."""

from typing import Any, NamedTuple

from benchmarks.quality.published.tables import Table, published


class Beside(NamedTuple):
    """A table, ready to be written.

    Attributes:
        title: What it is of.
        note: Where its figures come from, or why there are none.
        head: Names of the columns: figures, this run, and the rows of printed tables.
        body: A row for each figure.
    """

    title: str
    note: str
    head: list[str]
    body: list[list[str]]


def printed(total: dict[str, Any]) -> list[Table]:
    """Printed tables of the same figures, over the same types, domain and version."""
    return [table for table in published() if table.benchmark == total["published"]]


def totals(summary: dict[str, Any]) -> list[Beside]:
    """The official figures of a run, a table for each set of them and each printed table that compares with it."""
    judge, found = summary["judge"], []
    ours = f"this run ({judge['column']})" if judge else "this run"
    for total in summary["totals"]:
        if not total["figures"]:
            found.append(Beside(total["title"], f"No official figures: {total['why']}.", ["figure", ours], []))
            continue
        own = {row["figure"]: row["value"] for row in total["figures"]}
        counted = [[name, f"{value:.2f}"] for name, value in own.items()]
        sides = [
            Beside(
                f"{total['title']} beside {table.title}",
                f"Printed in {table.source}; their judge may be another.",
                ["figure", ours, *table.rows],
                [[name, f"{own[name]:.2f}", *_column(table, name)] for name in own if name in table.decimals],
            )
            for table in printed(total)
            if own.keys() & table.decimals.keys()
        ]
        found += [Beside(total["title"], "", ["figure", ours], counted), *sides]
    return found


def _column(table: Table, name: str) -> list[str]:
    figures = (row[name] for row in table.rows.values())
    return ["" if figure is None else f"{figure:.{table.decimals[name]}f}" for figure in figures]

"""`bernini bench check`: whether the totals of printed tables follow from their parts."""

from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from benchmarks.quality.published.tables import Table, published, read_tables
from benchmarks.quality.totals.catalogue import RULES
from benchmarks.quality.totals.rules import Rule

Verdict = Literal["follows", "differs", "parts missing"]
EPSILON = 1e-9  # of floating point, in units of print


class Checked(NamedTuple):
    """One total of a printed table.

    Attributes:
        table: Title of the table.
        row: Row.
        column: Column of the total.
        printed: The figure as it is printed.
        recomputed: What its parts give, in the same units; none without them.
        slack: How far the two may be apart because all of them are rounded.
        verdict: What follows from that.
    """

    table: str
    row: str
    column: str
    printed: float
    recomputed: float | None
    slack: float
    verdict: Verdict


def check(tables: Iterable[Table]) -> list[Checked]:
    """Recompute every printed total from its parts.

    A part that is a total itself is recomputed, too, where its own parts are there. Half a unit of the last decimal of
    each figure, carried through the formula, is what rounding may account for.
    """
    return [
        one
        for table in tables
        for name, row in table.rows.items()
        for one in _row(table, name, {column: figure for column, figure in row.items() if figure is not None})
    ]


def _row(table: Table, name: str, row: Mapping[str, float]) -> Iterable[Checked]:
    rules = RULES[table.benchmark]
    half = {column: 0.5 * 10 ** -table.decimals[column] / table.scale for column in row}
    exact = {column: figure / table.scale for column, figure in row.items()}
    totals = recompute(rules, exact)
    shifted = {column: recompute(rules, exact | {column: exact[column] + half[column]}) for column in row}
    for rule in rules:
        total = rule.total
        if total not in row:
            continue
        if total not in totals:
            yield Checked(table.title, name, total, row[total], None, 0.0, "parts missing")
            continue
        moved = sum(abs(other[total] - totals[total]) for other in shifted.values())
        slack, found = (half[total] + moved) * table.scale, totals[total] * table.scale
        verdict: Verdict = "follows" if abs(found - row[total]) <= slack + EPSILON else "differs"
        yield Checked(table.title, name, total, row[total], found, slack, verdict)


def recompute(rules: Sequence[Rule], row: Mapping[str, float]) -> dict[str, float]:
    """Totals of a row by column, in their own units, as far as their parts are there."""
    totals: dict[str, float] = {}
    for rule in rules:
        known = {**row, **totals}
        if all(part in known for part in rule.parts):
            totals[rule.total] = rule.compute({part: known[part] for part in rule.parts})
    return totals


def report(tables: Sequence[Table]) -> str:
    """What is found as Markdown: a line a table, then the totals that do not follow."""
    checked: list[Checked] = []
    lines = ["| table | rows | totals | follow | differ | parts missing | source |", "|---|---|---|---|---|---|---|"]
    for table in tables:
        of_table = check([table])
        counts = Counter(one.verdict for one in of_table)
        found = [counts[verdict] for verdict in get_args(Verdict)]
        checked += of_table
        cells = (table.title, len(table.rows), sum(found), *found, table.source)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    wrong = [one for one in checked if one.verdict == "differs"]
    whole = sum(one.verdict != "parts missing" for one in checked)
    lines += ["", f"{whole - len(wrong)} of {whole} totals follow from their parts within rounding."]
    if wrong:
        lines += ["", "| table | row | column | printed | from its parts | rounding |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {one.table} | {one.row} | {one.column} | {one.printed:g} | {one.recomputed:.4f} | {one.slack:.4f} |"
            for one in wrong
        ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Check a file of tables, or those that come with the package, and print what was found."""
    parser = ArgumentParser("bernini bench check", description=__doc__)
    parser.add_argument("--rows", metavar="FILE", help="JSON of tables (default: the published rows in the package)")
    options = parser.parse_args(argv)
    tables = read_tables(options.rows) if options.rows else published()
    print(report(tables))
    return 0

"""Tables of figures that others have printed, with where they stand."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.totals.catalogue import RULES
from bernini.errors import ConfigError, DataError
from bernini.suggest import closest

ROWS = Path(__file__).parent / "rows"


@dataclass(frozen=True)
class Table:
    """A table as it is printed.

    Attributes:
        benchmark: A name of the catalogue of rules.
        title: What the table is called.
        source: Where it stands.
        scale: What its figures are multiplied by for print, e.g. 100 for per cent.
        decimals: Decimals of each column, which tell how far a figure may be off by rounding.
        rows: Figures by row and column; none where there is none.
    """

    benchmark: str
    title: str
    source: str
    scale: float
    decimals: Mapping[str, int]
    rows: Mapping[str, Mapping[str, float | None]]


def published() -> list[Table]:
    """All tables that come with the package."""
    return [table for path in sorted(ROWS.glob("*.json")) for table in read_tables(path)]


def read_tables(path: str | Path) -> list[Table]:
    """Read a file of tables.

    Args:
        path: JSON, ``{"tables": [...]}``; each table has the attributes of `Table`, but ``columns`` names the columns,
            ``rows`` holds lists, one figure or null a column, ``decimals`` is one number for all columns and
            ``decimals_of`` names those that differ.

    Raises:
        ConfigError: There is no such file.
        DataError: The file is no such JSON, a row has more or fewer figures than there are columns, a name stands
            twice, or a benchmark is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", fix="leave --rows out for the rows that come with the package")
    try:
        tables = json.loads(path.read_text(), object_pairs_hook=_once)["tables"]
        return [_table(raw, f"{path}, table {number}") for number, raw in enumerate(tables)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "the file holds no tables", where=str(path), why=repr(error), fix="see docs/totals.md"
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose names JSON itself lets stand twice, the last one alone being kept."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} stands twice")
    return dict(pairs)


def _table(raw: dict[str, Any], where: str) -> Table:
    if raw["benchmark"] not in RULES:
        hint = closest(raw["benchmark"], RULES)
        raise DataError(f"benchmark {raw['benchmark']!r} is unknown", where=where, fix=hint or ", ".join(RULES))
    columns, scale = raw["columns"], float(raw["scale"])
    decimals = {
        name: int(n) for name, n in (dict.fromkeys(columns, raw["decimals"]) | raw.get("decimals_of", {})).items()
    }
    if len(decimals) != len(columns) or scale <= 0:
        raise DataError("a column stands twice, decimals are of no column, or the scale is not positive", where=where)
    rows = {}
    for name, figures in raw["rows"].items():
        if len(figures) != len(columns):
            raise DataError(
                f"row {name!r} has {len(figures)} figures for {len(columns)} columns",
                where=where,
                why="which of them is missing cannot be told",
                fix="write null in its place",
            )
        for column, figure in zip(columns, figures, strict=True):
            if not (figure is None or (type(figure) in (int, float) and math.isfinite(figure))):
                raise DataError(f"{figure!r} in row {name!r}, column {column!r}, is no figure", where=where)
        rows[name] = dict(zip(columns, figures, strict=True))
    return Table(raw["benchmark"], raw["title"], raw["source"], scale, decimals, rows)

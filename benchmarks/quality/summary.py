"""The stage that makes the table of a run from all its scores."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.quality.folder import SUMMARY, Row, RunFolder, dumps
from benchmarks.quality.interface import Benchmark, Cell, Item, asked, coverage, is_comparable, without
from benchmarks.quality.tables import write_tables
from benchmarks.quality.tallying import tally
from benchmarks.quality.totals.records import SHARE
from bernini.files import replacing


def aggregate(benchmark: Benchmark, items: Sequence[Item], folder: RunFolder) -> dict[str, Any]:
    """Make the table of everything that has been scored, and write it down; gives the summary."""
    scored = folder.scored(benchmark)
    cells = benchmark.aggregate(without(asked(items, scored), folder.void(scored)), folder.values(scored))
    summary = summarise(benchmark, items, scored, cells, folder)
    write_summary(folder, summary)
    return summary


def summarise(
    benchmark: Benchmark, items: Sequence[Item], scored: Sequence[str], cells: Sequence[Cell], folder: RunFolder
) -> dict[str, Any]:
    """What ``summary.json`` holds.

    Args:
        benchmark: What was run.
        items: All items of the run, with all scores that they get.
        scored: Names of the scores that this run asks for.
        cells: The table of these.
        folder: The run.
    """
    run, void = folder.manifest()["run"], folder.void(scored)
    values = {**folder.values(scored), **dict.fromkeys(void)}
    ranges = {name: benchmark.ranges.get(name, SHARE) for name in benchmark.metrics}
    return {
        "benchmark": {
            "name": benchmark.name,
            "version": benchmark.version,
            "metrics": dict(benchmark.metrics),
            "ranges": {name: [_finite(allowed.low), _finite(allowed.high)] for name, allowed in ranges.items()},
        },
        "comparable": is_comparable(cells, without(items, void), run["items"]["of"]),
        "items": len(items),
        "of": run["items"]["of"],
        "coverage": coverage(cells),
        "cells": [c._asdict() for c in cells],
        "failures": failures(asked(items, scored), scored, folder),
        "missing": missing(benchmark, items, scored),
        "totals": tally(benchmark.tallies(items), values, len(items) == run["items"]["of"]),
        "judge": folder.judge(),
        "models": folder.models(),
        "run": run,
    }


def missing(benchmark: Benchmark, items: Sequence[Item], scored: Sequence[str]) -> list[Row]:
    """Scores that items get and this run does not give, each with the number of items and what it takes."""
    counts = Counter(name for item in items for name in item.metrics if name not in scored)
    return [
        {"score": name, "items": counts[name], "needs": list(benchmark.wants(name))}
        for name in benchmark.metrics
        if counts[name]
    ]


def write_summary(folder: RunFolder, summary: dict[str, Any]) -> None:
    """Write ``summary.json``, ``table.md`` and ``table.csv``."""
    with replacing(folder.root / SUMMARY) as temporary:
        temporary.write_text(dumps(summary, indent=2) + "\n")
    write_tables(folder.root, summary)


def failures(items: Sequence[Item], scored: Sequence[str], folder: RunFolder) -> list[Row]:
    """Items that lack an output or a score that is asked for, each with the stage that failed and the reason."""
    generated = folder.generated.rows()
    found = {metric: folder.scores(metric).rows() for metric in scored}
    rows = []
    for item in items:
        lacking = [metric for metric in item.metrics if "value" not in found[metric].get(item.id, {})]
        made = generated.get(item.id, {"failed": "not generated yet"})
        if not lacking and (item.metrics or "failed" not in made):
            continue
        judged = found[lacking[0]].get(item.id, {"failed": "not scored yet"}) if lacking else {}
        stage, why = ("generate", made["failed"]) if "failed" in made else ("score", judged["failed"])
        rows.append({"id": item.id, "stage": stage, "why": why})
    return rows


def _finite(end: float) -> float | None:
    return end if math.isfinite(end) else None

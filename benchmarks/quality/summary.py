"""The stage that makes the table of a run from all its scores."""

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.quality.folder import SUMMARY, Row, RunFolder
from benchmarks.quality.interface import Benchmark, Cell, Item, coverage, is_comparable
from benchmarks.quality.tables import write_tables
from bernini.files import replacing


def aggregate(benchmark: Benchmark, items: Sequence[Item], folder: RunFolder) -> dict[str, Any]:
    """Make the table of everything that has been scored, and write it down; gives the summary."""
    cells = benchmark.aggregate(items, folder.values(benchmark.metrics))
    summary = summarise(benchmark, items, cells, failures(benchmark, items, folder), folder.manifest()["run"])
    write_summary(folder, summary)
    return summary


def summarise(
    benchmark: Benchmark, items: Sequence[Item], cells: Sequence[Cell], failed: Sequence[Row], run: dict[str, Any]
) -> dict[str, Any]:
    """What ``summary.json`` holds."""
    return {
        "benchmark": {"name": benchmark.name, "version": benchmark.version, "metrics": dict(benchmark.metrics)},
        "comparable": is_comparable(cells, items, run["items"]["of"]),
        "items": len(items),
        "of": run["items"]["of"],
        "coverage": coverage(cells),
        "cells": [c._asdict() for c in cells],
        "failures": list(failed),
        "run": run,
    }


def write_summary(folder: RunFolder, summary: dict[str, Any]) -> None:
    """Write ``summary.json``, ``table.md`` and ``table.csv``."""
    with replacing(folder.root / SUMMARY) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
    write_tables(folder.root, summary)


def failures(benchmark: Benchmark, items: Sequence[Item], folder: RunFolder) -> list[Row]:
    """Items that lack a score, each with the stage that failed and the reason."""
    generated = folder.generated.rows()
    scored = {metric: folder.scores(metric).rows() for metric in benchmark.metrics}
    rows = []
    for item in items:
        missing = [metric for metric in item.metrics if "value" not in scored[metric].get(item.id, {})]
        if not missing:
            continue
        made = generated.get(item.id, {"failed": "not generated yet"})
        judged = scored[missing[0]].get(item.id, {"failed": "not scored yet"})
        stage, why = ("generate", made["failed"]) if "failed" in made else ("score", judged["failed"])
        rows.append({"id": item.id, "stage": stage, "why": why})
    return rows

"""A run as an HTML page: its tables, a gallery to browse, and how it was made."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.beside import totals
from benchmarks.quality.folder import RunFolder
from benchmarks.quality.gallery import gallery
from benchmarks.quality.interface import Benchmark, Item
from benchmarks.quality.tables import LACKING, head_and_body, headline, lacking, legend
from bernini.report import Report, Table, write_report

MAX_MIB = 60.0  # about twice what the usual number of items takes, of clips of 81 frames


def write_page(benchmark: Benchmark, items: Sequence[Item], folder: RunFolder, examples: int) -> Path:
    """Write ``report.html``.

    Args:
        benchmark: Gives the inputs of the examples.
        items: All items of the run.
        folder: The run, aggregated.
        examples: How many items to show, see `choose`.

    Raises:
        ConfigError: Nothing was aggregated yet.
    """
    summary, manifest = folder.summary(), folder.manifest()
    head, body = head_and_body(summary, folder.root)
    told = "; ".join(f"{name.replace('_', ' ')}: {text}" for name, text in benchmark.metrics.items())
    tables = [Table("Scores", head, body, f"{legend(summary)} {told[0].upper()}{told[1:]}.")] if body else []
    tables += [Table(table.title, table.head, table.body, table.note) for table in totals(summary)]
    if summary["missing"]:
        tables.append(Table("Not scored in this run", LACKING, lacking(summary)))
    if summary["failures"]:
        rows = [[row["id"], row["stage"], row["why"]] for row in summary["failures"]]
        tables.append(Table("Failures", ["item", "stage", "why"], rows))
    report = Report(
        title=f"Benchmark {benchmark.name}",
        lead=f"{headline(summary)}. {benchmark.notes}",
        tables=tables,
        cases=gallery(benchmark, items, folder, examples),
        config=json.dumps(manifest["run"], indent=2),
        environment=manifest["environment"],
    )
    return write_report(report, folder.root / "report.html", MAX_MIB)

"""A run's summary as Markdown and CSV, and its inputs as files."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.beside import printed, totals
from benchmarks.quality.folder import RunFolder
from benchmarks.quality.interface import Benchmark, Item
from bernini.files import replacing
from bernini.media import write_image, write_video

BOUNDS = {"source": "unedited source", "ceiling": "true target through the VAE"}
"""References that bound what a model can reach, each a run of its own under ``bounds/``."""

LACKING = ("score", "items", "takes")
NOT_SCORED = "Not scored in this run:"


def legend(summary: dict[str, Any]) -> str:
    """What the figures are."""
    shown = {cell["metric"] for cell in summary["cells"]}
    own = any(not _is_share(summary, metric) for metric in shown)
    return f"Per cent{', other ranges than 0 to 1 as they are' if own else ''}, with 95 % intervals."


def lacking(summary: dict[str, Any]) -> list[list[str]]:
    """Scores that the run does not give: name, items, what they take."""
    return [[row["score"], str(row["items"]), "; ".join(row["needs"])] for row in summary["missing"]]


def rows_of(summary: dict[str, Any], root: Path) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """Cells by metric of each row: every task, and below it what bounds it where that was measured."""
    rows = []
    bounds = {text: RunFolder(root / "bounds" / name) for name, text in BOUNDS.items()}
    below = {text: _by_task(b.summary()) for text, b in bounds.items() if (b.root / "summary.json").is_file()}
    for task, cells in _by_task(summary).items():
        rows.append((task, cells))
        rows += [(f"{task}, {text}", table[task]) for text, table in below.items() if task in table]
    return rows


def _by_task(summary: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in summary["cells"]:
        found.setdefault(cell["task"], {})[cell["metric"]] = cell
    return found


def head_and_body(summary: dict[str, Any], root: Path) -> tuple[list[str], list[list[str]]]:
    """The table as text: task, guidance, items, then value and interval of each metric."""
    measured = {cell["metric"] for cell in summary["cells"]}
    metrics = [metric for metric in summary["benchmark"]["metrics"] if metric in measured]
    modes = summary["run"].get("sampling", {}).get("guidance", {})
    body = []
    for name, cells in rows_of(summary, root):
        of, missing = max(c["of"] for c in cells.values()), max(c["of"] - c["n"] for c in cells.values())
        figures = [_told(cells[m], _is_share(summary, m)) if m in cells else "" for m in metrics]
        body.append([name, modes.get(name, ""), f"{of - missing} of {of}" if missing else str(of), *figures])
    return ["task", "guidance", "items", *(_column(summary, metric) for metric in metrics)], body


def _column(summary: dict[str, Any], metric: str) -> str:
    judge = summary["judge"]
    shown = metric.replace("_", " ")
    return f"{shown} ({judge['column']})" if judge and metric in judge["scores"] else shown


def _is_share(summary: dict[str, Any], metric: str) -> bool:
    return bool(summary["benchmark"]["ranges"][metric] == [0, 1])


def _told(cell: dict[str, Any], share: bool) -> str:
    if cell["value"] is None:
        return "none"
    value, low, high = (f"{100 * cell[k]:.1f}" if share else f"{cell[k]:.3f}" for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def headline(summary: dict[str, Any]) -> str:
    """What the figures are of, and whether they may be compared with others."""
    name, share = summary["benchmark"]["name"], f"{summary['items']} of {summary['of']} items"
    scored = f"coverage {100 * summary['coverage']:.2f} %" if summary["cells"] else "nothing scored"
    text = f"{name}, version {summary['benchmark']['version']}, {share}, {scored}"
    return text + ("" if summary["comparable"] else "; not comparable with full runs")


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def write_tables(root: Path, summary: dict[str, Any]) -> None:
    """Write ``table.md`` and ``table.csv``."""
    head, body = head_and_body(summary, root)
    settings = f"Sampling: `{json.dumps(summary['run'].get('sampling', {}))}`"
    parts = [f"{headline(summary)}. {legend(summary)}", markdown(head, body)] if body else [f"{headline(summary)}."]
    for one in totals(summary):
        parts += [f"{one.title}. {one.note}".strip(), *([markdown(one.head, one.body)] if one.body else [])]
    if summary["missing"]:
        parts += [NOT_SCORED, markdown(LACKING, lacking(summary))]
    with replacing(root / "table.md") as temporary:
        temporary.write_text("\n\n".join([*parts, settings]) + "\n")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "metric", "value", "low", "high", "n", "of"])
    for name, cells in rows_of(summary, root):
        writer.writerows([name, *(c[k] for k in ("metric", "value", "low", "high", "n", "of"))] for c in cells.values())
    for total in summary["totals"]:
        ours = ([figure["figure"], figure["value"], "", "", figure["n"], figure["n"]] for figure in total["figures"])
        writer.writerows([total["title"], *row] for row in ours)
        names = {figure["figure"] for figure in total["figures"]}
        for table in printed(total) if names else ():
            for name, row in table.rows.items():
                figures = ((column, figure) for column, figure in row.items() if column in names and figure is not None)
                writer.writerows([f"{table.title}, {name}", *pair, "", "", "", ""] for pair in figures)
    with replacing(root / "table.csv") as temporary:
        temporary.write_text(file.getvalue())


def write_inputs(benchmark: Benchmark, item: Item, folder: Path) -> list[tuple[str, Path]]:
    """Write an item's sources, and its target where that is known, as files that browsers show; old ones stay.

    Returns:
        Label and file, sources first.
    """
    conversation = benchmark.conversation(item)
    named = [
        (f"source {i}" if len(conversation.sources) > 1 else "source", m) for i, m in enumerate(conversation.sources)
    ]
    if not conversation.info.get("blank_target"):
        named += [("target", message) for message in conversation.targets]
    files = []
    for label, message in named:
        if message.media is None or message.media.pixels is None:
            continue
        pixels, video = message.media.pixels, message.media.pixels.shape[1] > 1
        path = folder / f"{item.id}-{label.replace(' ', '')}.{'mp4' if video else 'png'}"
        if not path.is_file():
            if video:
                write_video(path, pixels, message.media.fps)
            else:
                write_image(path, pixels)
        files.append((label, path))
    return files

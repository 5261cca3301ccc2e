"""The demo's report."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.demo import planning
from benchmarks.demo.commands import Command
from benchmarks.demo.teaching import Lesson
from benchmarks.quality.toy import ToyBenchmark
from bernini.report import Case, Report, Table

TAUGHT = {
    "source": "unedited source",
    "before": "toy family as shipped",
    "after": "with the LoRA",
    "ceiling": "true target through the VAE",
}
NOTE = "Per cent, with 95 % intervals."


def summarise(
    metrics: Mapping[str, Any],
    planned: Sequence[Case],
    commands: Sequence[Command],
    lesson: Lesson,
    facts: Mapping[str, str],
) -> Report:
    """The report's contents.

    Args:
        metrics: What ``metrics.json`` holds.
        planned: Examples of edits that were planned.
        commands: Commands that planned.
        lesson: What came of teaching.
        facts: Of the machine.
    """
    names = [name for name in ToyBenchmark.metrics if name in metrics["after"]]

    def table(title: str, labels: Mapping[str, str]) -> Table:
        rows = [[label, *(_interval(metrics[name][metric]) for metric in names)] for name, label in labels.items()]
        return Table(title, ["", *(name.replace("_", " ") for name in names)], rows, NOTE)

    def change(metric: str, before: str, after: str) -> str:
        return f"{_percent(metrics[before][metric]['value'])} → {_percent(metrics[after][metric]['value'])} %"

    return Report(
        title="Bernini demo: planned edits, and a new one in minutes",
        lead=(
            "First, edits that name what is to change by a riddle only: “remove the one that moves fastest”. The "
            "planner thinks of the target as embeddings, and the renderer draws what it is shown. Then a new edit: "
            "nobody has told the family what a golden statue is, and a LoRA of its renderer was trained here in "
            f"{metrics['steps']} steps. All of it took {metrics['seconds'] / 60:.1f} minutes. A verifier that reads "
            f"pixels alone scored {metrics['items']} clips each time, whose combinations of colour, shape and motion "
            "were never trained on."
        ),
        summary=[
            ("reasoning edits done", change("edit_done", "unplanned", "planned"), "without a plan → with one"),
            ("new edit done", change("edit_done", "before", "after"), "before the LoRA → with it"),
            ("rest unchanged", change("rest_unchanged", "before", "after"), ToyBenchmark.metrics["rest_unchanged"]),
        ],
        tables=[table("Edits that take a thought", planning.RUNS), table("A new edit, before and after", TAUGHT)],
        charts=lesson.charts,
        cases=[*planned, *lesson.cases],
        commands=[command.line for command in (*commands, *lesson.commands)],
        config=lesson.config,
        environment=facts,
    )


def _percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f}"


def _interval(cell: Mapping[str, float]) -> str:
    return f"{_percent(cell['value'], 1)} [{_percent(cell['low'])}, {_percent(cell['high'])}]"

"""`bernini demo`: toy families plan edits that take a thought, and are taught one that they have never seen.

Every step that trains, samples or scores is a `bernini` command over what lies in the run's folder.
"""

import json
import shutil
import signal
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils.logging import disable_progress_bar

from benchmarks.demo import planning, teaching
from benchmarks.demo.commands import PLANNING_FAMILY
from benchmarks.demo.page import summarise
from benchmarks.quality.environment import environment
from bernini.errors import ConfigError
from bernini.planner.model import FOLDER as PLANNER
from bernini.report import write_report


def run(out: Path, steps: int, samples: int, held_out: int, progress: Progress) -> dict[str, Any]:
    """Plan, then teach.

    Args:
        out: Folder of the run, empty.
        steps: Training steps.
        samples: Training samples.
        held_out: Clips that are scored, of each kind of edit.
        progress: Bar to show how far it is.

    Returns:
        What goes into ``metrics.json``; the report is written beside it.
    """
    started = time.monotonic()
    planned, cases, commands = planning.run(out, held_out, progress)
    lesson = teaching.run(out, steps, samples, held_out, progress)
    facts = environment()
    metrics: dict[str, Any] = planned | lesson.metrics
    metrics |= {"items": held_out, "steps": steps, "seconds": round(time.monotonic() - started, 1)}
    (out / "metrics.json").write_text(json.dumps({**metrics, "environment": facts}, indent=2) + "\n")
    write_report(summarise(metrics, cases, commands, lesson, facts), out / "report.html")
    return metrics


def make_empty(out: Path) -> None:
    """Make a folder, or empty one that an earlier demo wrote.

    Raises:
        ConfigError: The folder holds something else.
    """
    if out.exists() and any(out.iterdir()):
        if not (out / "data").is_dir() and not (out / "unplanned").is_dir():
            raise ConfigError(f"{out} is not empty", why="it does not look like a demo's folder", fix="another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command in hand, too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str]) -> int:
    """Run `bernini demo`."""
    parser = ArgumentParser(prog="bernini demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=400, help="training samples (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=48, help="clips that are scored (default: %(default)s)")
    options = parser.parse_args(argv)
    if min(options.steps, options.held_out, options.samples // 2) < 8:
        raise ConfigError("--steps and --held-out are at least 8, and --samples 16, which is a batch")
    if not (PLANNING_FAMILY / PLANNER).is_dir():
        raise ConfigError(
            "the toy families are not here",
            where=str(PLANNING_FAMILY),
            fix="run the demo from a checkout of the repository",
        )
    console = Console()
    make_empty(options.out)
    disable_progress_bar()  # of loading small models
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with ended_by_sigterm(), Progress(*columns, console=console) as progress:
        metrics = run(options.out, options.steps, options.samples, options.held_out, progress)
    scores = {name: 100 * metrics[name]["edit_done"]["value"] for name in (*planning.RUNS, *teaching.RUNS)}
    console.print(
        f"\nReasoning edits are done in {scores['planned']:.0f} % of {metrics['items']} held-out clips with a plan, "
        f"without in {scores['unplanned']:.0f} %.\n"
        f"The new edit is done in {scores['after']:.0f} %, before training in {scores['before']:.0f} %; "
        f"{metrics['seconds'] / 60:.1f} minutes\n"
        f"  report   {options.out / 'report.html'}\n  figures  {options.out / 'metrics.json'}\n"
        f"  clips    {options.out / 'after' / 'videos'}\n  LoRA     {options.out / 'fit' / 'lora'}",
        soft_wrap=True,
    )
    return 0

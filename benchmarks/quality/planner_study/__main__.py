"""The study's commands once its planners are trained: `before` once, `score` for all of them, `table` once."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality.planner_study import __doc__ as about
from benchmarks.quality.planner_study.scoring import Run, Scorer
from benchmarks.quality.planner_study.table import Records, page
from benchmarks.quality.plans.options import add_exam, exam_of
from benchmarks.quality.studies import study_parser
from benchmarks.speed.command import run_command, stopwatch
from bernini.files import replacing, write_text

ROOT = Path(__file__).parents[3]


def score_before(options: argparse.Namespace) -> None:
    """Score answers of the planner that all runs start from."""
    _write(options.out / "before.json", _scorer(options).before(Run.read(options.run)))


def score_runs(options: argparse.Namespace) -> None:
    """Score trained planners."""
    runs = [Run.read(folder.resolve()) for folder in options.runs]
    scorer = _scorer(options)
    for run in runs:
        _write(options.out / f"{run.folder.name}.json", scorer.after(run))


def make_table(options: argparse.Namespace) -> None:
    """Write the page."""
    write_text(options.page, page(Records(options.out)))
    print(options.page)


def _scorer(options: argparse.Namespace) -> Scorer:
    disable_progress_bar()  # of loading models
    return Scorer(exam_of(options), options.batch, torch.device(options.device), stopwatch())


def _write(path: Path, scores: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(scores) + "\n")


VERBS = {"before": score_before, "score": score_runs, "table": make_table}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    scores, file = Path("runs/planner/scores"), ROOT / "docs" / "results" / "planner.md"
    parser, verb = study_parser("benchmarks.quality.planner_study", about, VERBS, scores, file)
    for name in ("before", "score"):
        add_exam(verb[name])
    verb["before"].add_argument("run", type=Path, metavar="RUN", help="folder of a run of configs/toy/sight.yaml")
    verb["score"].add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Run a command."""
    options = parse(argv)
    VERBS[options.verb](options)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))

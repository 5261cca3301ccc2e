"""The study's commands once its runs are trained: `score` for all runs, `table` once."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality.cotraining_study import __doc__ as about
from benchmarks.quality.cotraining_study.runs import Run
from benchmarks.quality.cotraining_study.scoring import NEEDED, PARTS, REASONING, Scorer, Settings
from benchmarks.quality.cotraining_study.table import Records, page
from benchmarks.quality.plans.options import add_exam, exam_of
from benchmarks.quality.scoring import mapping
from benchmarks.quality.studies import study_parser
from benchmarks.quality.toy import ToyBenchmark
from benchmarks.speed.command import run_command, stopwatch
from bernini.files import write_text
from bernini.flow.guidance import PLANNED_MODES, Omegas
from bernini.renderer.sampling import SamplingConfig

ROOT = Path(__file__).parents[3]
WEIGHTS = {"vid": "source clips", "img": "sources", "txt": "the text", "tgt": "the plan"}


def score_runs(options: argparse.Namespace) -> None:
    """Score trained runs; what is scored already is passed over."""
    disable_progress_bar()  # of loading models
    omegas = Omegas(**{name: getattr(options, f"omega_{name}") for name in WEIGHTS}, scale=1.0)
    sampling = SamplingConfig(options.steps, mode=options.mode, omegas=omegas, max_pack=4 * options.batch)
    settings = Settings(exam_of(options), sampling)
    runs = [Run.read(folder.absolute()) for folder in options.runs]
    with mapping(options.workers) as mapped:
        device = torch.device(options.device)
        tools = options.workers, mapped, stopwatch()
        parts = [part for part in PARTS if part in {*options.tasks, *NEEDED}]
        scorer = Scorer(settings, options.family, options.out, options.batch, parts, device, *tools)
        for run in runs:
            scorer.score(run)


def make_table(options: argparse.Namespace) -> None:
    """Write the page."""
    write_text(options.page, page(Records(options.out)))
    print(options.page)


VERBS = {"score": score_runs, "table": make_table}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    scores, file = Path("runs/cotraining/scores"), ROOT / "docs" / "results" / "cotraining.md"
    parser, verb = study_parser("benchmarks.quality.cotraining_study", about, VERBS, scores, file)
    add = verb["score"].add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, such as runs/cotraining/paper-0")
    family = ROOT / "assets" / "toy"
    add("--family", type=Path, default=family, help="folder with VAE, text encoder and the renderer of `before`")
    others = [part for part in PARTS if part not in NEEDED]
    told = f"what is rendered besides {', '.join(REASONING)}, of: %(choices)s"
    add("--tasks", nargs="*", default=others, choices=others, metavar="TASK", help=told)
    add("--steps", type=int, default=ToyBenchmark.defaults["steps"], help="solver steps")
    add("--mode", choices=list(PLANNED_MODES), default="vae_txt_vit", help="guidance mode with a plan")
    for name, what in WEIGHTS.items():
        add(f"--omega-{name}", type=float, default=1.0, help=f"guidance weight of {what}; all 1 is no guidance")
    add_exam(verb["score"])
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Run a command."""
    options = parse(argv)
    VERBS[options.verb](options)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))

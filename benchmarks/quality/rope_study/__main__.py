"""The study's commands once its runs are trained: `bounds` once, `score` for all runs, `table` once."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.quality.rope_study.items import Clips
from benchmarks.quality.rope_study.scoring import Run, Scorer, write_scores
from benchmarks.quality.rope_study.table import Records, page
from benchmarks.quality.scoring import mapping
from benchmarks.quality.studies import study_parser
from benchmarks.quality.toy import ToyBenchmark
from bernini.errors import BerniniError, ConfigError
from bernini.files import write_text

ROOT = Path(__file__).parents[3]


def score_bounds(options: argparse.Namespace) -> None:
    """Score what the VAE alone makes of the true targets."""
    clips = Clips(options.frames, options.size, options.size)
    with mapping(options.workers) as mapped:
        scorer = Scorer(options.held_out, options.batch, torch.device(options.device), mapped)
        write_scores(options.out / "vae.json", scorer.bounds(clips))


def score_runs(options: argparse.Namespace) -> None:
    """Score trained renderers."""
    runs = [Run.read(folder.resolve()) for folder in options.runs]
    with mapping(options.workers) as mapped:
        scorer = Scorer(options.held_out, options.batch, torch.device(options.device), mapped)
        for run in runs:
            write_scores(options.out / f"{run.folder.name}.json", scorer.run(run, options.steps))


def make_table(options: argparse.Namespace) -> None:
    """Write the page."""
    write_text(options.page, page(Records(options.out)))
    print(options.page)


VERBS = {"bounds": score_bounds, "score": score_runs, "table": make_table}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: A number is too small.
    """
    file = ROOT / "docs" / "results" / "rope.md"
    parser, verb = study_parser("benchmarks.quality.rope_study", __doc__, VERBS, Path("runs/rope"), file)
    for name, one in verb.items():
        if name != "table":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            one.add_argument("--device", default=device, help="device of the models")
            one.add_argument("--batch", type=int, default=64, help="items at once")
            one.add_argument("--held-out", type=int, default=256, help="items of each number of images")
            one.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read outputs")
    verb["bounds"].add_argument("--frames", type=int, default=Clips.frames, help="frames of a clip, 4k + 1")
    verb["bounds"].add_argument("--size", type=int, default=Clips.height, help="height and width in pixels")
    verb["score"].add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    verb["score"].add_argument("--steps", type=int, default=ToyBenchmark.defaults["steps"], help="solver steps")
    options = parser.parse_args(argv)
    for name in ("held_out", "steps", "batch"):
        if getattr(options, name, 1) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is at least 1")
    return options


def main(argv: Sequence[str]) -> int:
    """Run a command; gives the exit code."""
    try:
        options = parse(argv)
        VERBS[options.verb](options)
    except BerniniError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

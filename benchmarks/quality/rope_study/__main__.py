"""The study's commands, in order: `data` once, `train` and `score` for each encoding and seed, `table` once."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from benchmarks.quality.rope_study.data import BEYOND, COMPARED, TRAINED, Clips, Encoder, load, workers
from benchmarks.quality.rope_study.scoring import Scorer, write_scores
from benchmarks.quality.rope_study.table import write_page
from benchmarks.quality.rope_study.training import Recipe, train
from bernini.errors import BerniniError, ConfigError, DataError
from bernini.renderer.segments import SegmentEncoding
from bernini.vae.codec import LatentCodec

ROOT = Path(__file__).parents[3]
ASSETS = ROOT / "assets" / "toy"


def make_data(options: argparse.Namespace) -> None:
    """Draw and encode all samples, and score what the VAE alone makes of the held-out ones."""
    clips = Clips(options.frames, options.size)
    device, folder = torch.device(options.device), options.out
    held_out, encoder = folder / "held_out.safetensors", Encoder(ASSETS, device)
    with workers(options.workers) as mapped:
        encoder.write(folder / "train.safetensors", clips, "train", TRAINED, options.samples, mapped)
        encoder.write(held_out, clips, "held_out", (*COMPARED, *BEYOND), options.held_out, mapped)
        records = Scorer(load(held_out, device), clips, encoder.codec, options.batch, mapped).ceiling()
    facts = {"frames": clips.frames, "size": clips.size, "samples": options.samples, "held_out": options.held_out}
    write_scores(folder / "vae.json", records, encoding="vae", data=facts)


def run_training(options: argparse.Namespace) -> None:
    """Train one encoding from one seed."""
    recipe = Recipe(options.encoding, options.seed, options.steps, options.batch, options.lr)
    examples = load(options.out / "train.safetensors", torch.device(options.device))
    facts = train(recipe, examples, run_folder(options))
    print(f"{recipe.encoding}, seed {recipe.seed}: loss {facts['loss'][-1]:.4f} after {facts['seconds']:.0f} s")


def run_scoring(options: argparse.Namespace) -> None:
    """Score one trained renderer."""
    folder, device = run_folder(options), torch.device(options.device)
    if not (folder / "run.json").is_file():
        raise DataError("there is no such run", where=str(folder), fix="train it first, with the same arguments")
    examples = load(options.out / "held_out.safetensors", device)
    data = json.loads((options.out / "vae.json").read_text())["data"]
    codec = LatentCodec.from_pretrained(ASSETS / "vae").to(device)
    with workers(options.workers) as mapped:
        scorer = Scorer(examples, Clips(data["frames"], data["size"]), codec, options.batch, mapped)
        records = scorer.model(folder, options.steps)
    write_scores(
        options.out / f"{folder.name}.json",
        records,
        encoding=options.encoding,
        seed=options.seed,
        sampling_steps=options.steps,
        run=json.loads((folder / "run.json").read_text()),
    )


def make_table(options: argparse.Namespace) -> None:
    """Write the page."""
    write_page(options.out, options.page)
    print(options.page)


def run_folder(options: argparse.Namespace) -> Path:
    """Folder of a run's weights."""
    return options.out / f"{options.encoding}-{options.seed}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: A number is too small.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.rope_study",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = {
        name: verbs.add_parser(name, help=act.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for name, act in VERBS.items()
    }
    cuda = torch.cuda.is_available()
    for name, one in verb.items():
        one.add_argument("--out", type=Path, default=Path("runs/rope"), help="folder of the study")
        if name != "table":
            one.add_argument("--device", default="cuda" if cuda else "cpu", help="device of the models")
            one.add_argument("--batch", type=int, default=128, help="samples at once")
        if name in ("data", "score"):
            one.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes on the CPU")
        if name in ("train", "score"):
            one.add_argument("--encoding", choices=get_args(SegmentEncoding), required=True)
            one.add_argument("--seed", type=int, default=0)
            steps, what = (4000, "optimizer steps") if name == "train" else (16, "solver steps")
            one.add_argument("--steps", type=int, default=steps, help=what)
    verb["train"].add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    verb["data"].add_argument("--samples", type=int, default=8000, help="training samples per number of references")
    verb["data"].add_argument("--held-out", type=int, default=256, help="held-out samples per number of references")
    verb["data"].add_argument("--frames", type=int, default=9, help="frames of a clip, 4k + 1")
    verb["data"].add_argument("--size", type=int, default=64, help="height and width in pixels")
    verb["table"].add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "rope.md")
    options = parser.parse_args(argv)
    for name in ("samples", "held_out", "steps", "batch"):
        if getattr(options, name, 1) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is at least 1")
    return options


VERBS = {"data": make_data, "train": run_training, "score": run_scoring, "table": make_table}


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

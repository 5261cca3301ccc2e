"""`bernini demo`: teaches the toy family an edit that it has never seen, and scores it before and after.

Every step that trains, samples or scores is a `bernini` command over what lies in the run's folder.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality.environment import environment
from benchmarks.quality.folder import RunFolder, read_output
from benchmarks.quality.interface import Item
from benchmarks.quality.tables import write_inputs
from benchmarks.quality.toy import ToyBenchmark
from bernini.chart import Chart, Curve
from bernini.errors import BerniniError, ConfigError
from bernini.report import Case, Report, Table, write_report
from datamodules.toyworld.shards import write_toy_shards

ROOT = Path(__file__).parents[1]
ASSETS, CONFIG = ROOT / "assets" / "toy", ROOT / "configs" / "toy" / "lora.yaml"
TASK, EDIT, FRAMES, SIZE = "v2v", "statue", 9, 64
VALIDATION, HELD_OUT, SHOWN, MOVING = 16, 48, 12, 6
TRAIN_SEED, VALIDATION_SEED = 100, 101  # neither the family's world nor the benchmark's
RUNS = ("before", "after")


class Failed(BerniniError):
    """A command of the demo that did not succeed."""


@dataclass(frozen=True)
class Command:
    """A `bernini` command that runs on its own.

    Attributes:
        words: What follows `bernini`.
        log: File that its output goes to.
    """

    words: tuple[str, ...]
    log: Path

    @property
    def line(self) -> str:
        """What a user would type."""
        return " ".join(("bernini", *self.words))

    def run(self, watch: Callable[[], None]) -> None:
        """Run it to its end.

        Args:
            watch: Called twice a second.

        Raises:
            Failed: With the end of the command's log.
        """
        environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as log:
            arguments = [sys.executable, "-m", "bernini", *self.words]
            process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, env=environ)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                watch()
        finally:
            process.terminate()
        if process.returncode:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])
            raise Failed(f"`{self.line}` failed", where=str(self.log), why=tail)


def fit_config(out: Path, steps: int) -> dict[str, Any]:
    """The shipped toy LoRA, reading from and writing into ``out``."""
    text = CONFIG.read_text().replace("${oc.env:RUN,runs/toy-lora}", str(out / "fit"))
    config = yaml.safe_load(text.replace("assets/toy", str(ASSETS)))
    config["data"]["init_args"] |= {"train": str(out / "data" / "train"), "val": str(out / "data" / "val")}
    trainer = config["trainer"]
    trainer |= {"max_steps": steps, "enable_progress_bar": False, "val_check_interval": max(1, steps // 6)}
    every = {"SampleVideos": max(1, steps // 3), "BenchmarkCallback": max(1, steps // 6), "ModelCheckpoint": steps}
    for callback in trainer["callbacks"]:
        name = callback["class_path"].rsplit(".", 1)[-1]
        if name in every:
            key = "every_n_train_steps" if name == "ModelCheckpoint" else "every_n_steps"
            callback["init_args"][key] = every[name]
    return config


def bench_words(out: Path, name: str, held_out: int) -> tuple[str, ...]:
    """Score the family on held-out clips; ``after`` with the LoRA."""
    words = ["bench", "run", "toy", "--model", ASSETS, "--out", out / name, "--tasks", TASK, "--edits", EDIT]
    words += ["--per-task", held_out, "--examples", 0]
    words += ["--bounds"] if name == "before" else ["--lora", out / "fit" / "lora"]
    return tuple(map(str, words))


def curve(path: Path, column: str, name: str) -> Curve:
    """One column of a CSV log."""
    rows = list(csv.DictReader(path.open())) if path.is_file() else []
    points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
    return Curve(name, [step for step, _ in points], [value for _, value in points])


def run(out: Path, steps: int, samples: int, held_out: int, progress: Progress) -> dict[str, Any]:
    """Data, scores, training, scores.

    Args:
        out: Folder of the run, empty.
        steps: Training steps.
        samples: Training samples.
        held_out: Clips that are scored.
        progress: Bar to show how far it is.

    Returns:
        What goes into ``metrics.json``; the report is written beside it.
    """
    started = time.monotonic()
    write = partial(write_toy_shards, tasks=[TASK], frames=FRAMES, height=SIZE, width=SIZE, edits=[EDIT])
    prepare = partial(write, vae=str(ASSETS / "vae"), text=str(ASSETS))
    bar = progress.add_task("making clips of the new edit", total=samples)
    prepare(
        out / "data" / "train",
        count=samples,
        seed=TRAIN_SEED,
        progress=lambda done: progress.update(bar, completed=done),
    )
    prepare(out / "data" / "val", count=VALIDATION, seed=VALIDATION_SEED, split="held_out")

    config = fit_config(out, steps)
    (out / "fit.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    before, after = (Command(bench_words(out, name, held_out), out / f"{name}.log") for name in RUNS)
    fit = Command(("fit", "-c", str(out / "fit.yaml")), out / "fit.log")
    log = out / "fit" / "logs" / "version_0" / "metrics.csv"

    def scored(name: str) -> Callable[[], None]:
        bar = progress.add_task(f"scoring {name}", total=held_out)
        file = RunFolder(out / name).scores("edit_done").file
        return lambda: progress.update(bar, completed=len(file.read_text().splitlines()) if file.is_file() else 0)

    def trained() -> Callable[[], None]:
        bar = progress.add_task("training a LoRA", total=steps)
        return lambda: progress.update(bar, completed=max(curve(log, "train/loss", "").steps, default=-1) + 1)

    steps_of = ((before, partial(scored, "before")), (fit, trained), (after, partial(scored, "after")))
    for command, begin in steps_of:
        watch = begin()
        command.run(watch)
        watch()

    summaries = {name: RunFolder(out / name).summary() for name in RUNS}
    bounds = {name: RunFolder(out / "before" / "bounds" / name).summary() for name in ("source", "ceiling")}
    metrics: dict[str, Any] = {
        name: {cell["metric"]: cell for cell in summary["cells"]} for name, summary in (summaries | bounds).items()
    }
    metrics |= {"items": held_out, "steps": steps, "seconds": round(time.monotonic() - started, 1)}
    facts = environment()
    (out / "metrics.json").write_text(json.dumps({**metrics, "environment": facts}, indent=2) + "\n")
    benchmark = ToyBenchmark(tasks=(TASK,), edits=(EDIT,), per_task=held_out)
    cases = [case_of(out, benchmark, item) for item in benchmark.items()[:SHOWN]]
    write_animation(out / "edits.webp", sheet(out, benchmark, benchmark.items()[:MOVING]), scale=4)
    charts = [
        Chart("velocity loss, both experts", [curve(log, f"{s}/loss", n) for s, n in STAGES.items()], smoothing=0.9),
        Chart(
            "held-out clips while training, share",
            [curve(log, f"bench/toy/{TASK}/{m}", m.replace("_", " ")) for m in ("edit_done", "rest_unchanged")],
        ),
    ]
    commands = [c.line for c in (before, fit, after)]
    write_report(
        summarise(metrics, benchmark, charts, cases, commands, (out / "fit.yaml").read_text(), facts),
        out / "report.html",
    )
    return metrics


STAGES = {"train": "training", "val": "held out"}


def case_of(out: Path, benchmark: ToyBenchmark, item: Item) -> Case:
    """Source, output before and after, target."""
    *sources, target = write_inputs(benchmark, item, out / "examples")
    made = [(name, RunFolder(out / name).output(benchmark, item)) for name in RUNS]
    values = RunFolder(out / "after").values(benchmark.metrics)
    scores = {m.replace("_", " "): values[item.id, m] for m in item.metrics if (item.id, m) in values}
    return Case(item.id, item.prompt, [*sources, *made, target], scores)


def sheet(out: Path, benchmark: ToyBenchmark, items: Sequence[Item]) -> torch.Tensor:
    """``[3, T, H, W]`` uint8: sources over outputs before over outputs after, an item a column."""
    columns = []
    for item in items:
        (_, source), *_ = write_inputs(benchmark, item, out / "examples")
        files = [source, *(RunFolder(out / name).output(benchmark, item) for name in RUNS)]
        columns.append(torch.cat([read_output(file, item) for file in files], dim=2))
    return torch.cat(columns, dim=3)


def summarise(
    metrics: dict[str, Any],
    benchmark: ToyBenchmark,
    charts: Sequence[Chart],
    cases: Sequence[Case],
    commands: Sequence[str],
    config: str,
    facts: dict[str, str],
) -> Report:
    """The report's contents."""
    names = [name for name in benchmark.metrics if name in metrics["after"]]

    def percent(cell: dict[str, Any], digits: int = 0) -> str:
        return f"{100 * cell['value']:.{digits}f}"

    def row(name: str) -> list[str]:
        cells = [metrics[name].get(metric) for metric in names]
        return [f"{percent(c, 1)} [{percent({'value': c['low']})}, {percent({'value': c['high']})}]" for c in cells]

    labels = {
        "source": "unedited source",
        "before": "toy family as shipped",
        "after": "with the LoRA",
        "ceiling": "true target through the VAE",
    }
    return Report(
        title="Bernini demo: a new edit in minutes",
        lead=(
            "The toy family edits clips in many ways, but nobody has told it what a golden statue is. A LoRA was "
            f"trained on this machine in {metrics['steps']} steps; with data and scoring it took "
            f"{metrics['seconds'] / 60:.1f} minutes. A verifier that reads pixels alone scored {metrics['items']} "
            "clips whose combinations of colour, shape and motion were never trained on."
        ),
        summary=[
            (
                name.replace("_", " "),
                f"{percent(metrics['before'][name])} → {percent(metrics['after'][name])} %",
                benchmark.metrics[name],
            )
            for name in names
        ],
        tables=[
            Table(
                "Before and after",
                ["", *(name.replace("_", " ") for name in names)],
                [[label, *row(name)] for name, label in labels.items()],
                "Per cent, with 95 % intervals.",
            )
        ],
        charts=charts,
        cases=cases,
        commands=commands,
        config=config,
        environment=facts,
    )


def write_animation(path: Path, pixels: torch.Tensor, scale: int) -> None:
    """Write ``[3, T, H, W]`` uint8 pixels as a looping WebP, enlarged without smoothing."""
    enlarged = pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    first, *others = (Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in enlarged.unbind(1))
    first.save(path, save_all=True, append_images=others, duration=1000 // 16, loop=0, lossless=True)


def make_empty(out: Path) -> None:
    """Make a folder, or empty one that an earlier demo wrote.

    Raises:
        ConfigError: The folder holds something else.
    """
    if out.exists() and any(out.iterdir()):
        if not (out / "data").is_dir():
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
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="clips that are scored (default: %(default)s)")
    options = parser.parse_args(argv)
    if min(options.steps, options.samples, options.held_out) < 16:
        raise ConfigError("--steps, --samples and --held-out are at least 16")
    if not (ASSETS / "transformer").is_dir():
        raise ConfigError(
            "the toy family is not here", where=str(ASSETS), fix="run the demo from a checkout of the repository"
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
    before, after = (100 * metrics[name]["edit_done"]["value"] for name in RUNS)
    console.print(
        f"\nThe new edit is done in {after:.0f} % of {metrics['items']} held-out clips, before training in "
        f"{before:.0f} %; {metrics['seconds'] / 60:.1f} minutes\n"
        f"  report   {options.out / 'report.html'}\n  figures  {options.out / 'metrics.json'}\n"
        f"  clips    {options.out / 'after' / 'videos'}\n  LoRA     {options.out / 'fit' / 'lora'}",
        soft_wrap=True,
    )
    return 0

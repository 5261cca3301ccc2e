"""The demo's second part: a LoRA teaches the family an edit that it has never seen."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from rich.progress import Progress

from benchmarks.demo.commands import FAMILY, FRAMES, ROOT, SIZE, Command, bench, cells, watch_scores
from benchmarks.quality.folder import RunFolder, read_output
from benchmarks.quality.interface import Item
from benchmarks.quality.tables import write_inputs
from benchmarks.quality.toy import ToyBenchmark
from bernini.chart import Chart, Curve
from bernini.report import Case
from datamodules.toyworld.shards import write_toy_shards

CONFIG = ROOT / "configs" / "toy" / "lora.yaml"
TASK, EDIT = "v2v", "statue"
VALIDATION, SHOWN, MOVING = 16, 12, 6
TRAIN_SEED, VALIDATION_SEED = 100, 101  # neither the family's world nor the benchmark's
RUNS = ("before", "after")
BOUNDS = ("source", "ceiling")
STAGES = {"train": "training", "val": "held out"}


@dataclass(frozen=True)
class Lesson:
    """What came of it.

    Attributes:
        metrics: Of each run of `RUNS` and `BOUNDS`.
        charts: Of the training.
        cases: Examples.
        commands: What was run.
        config: The training's configuration, YAML.
    """

    metrics: dict[str, Any]
    charts: list[Chart]
    cases: list[Case]
    commands: list[Command]
    config: str


def run(out: Path, steps: int, samples: int, held_out: int, progress: Progress) -> Lesson:
    """Data, scores, training, scores.

    Args:
        out: The demo's folder.
        steps: Training steps.
        samples: Training samples.
        held_out: Clips that are scored.
        progress: Bar to show how far it is.
    """
    write = partial(write_toy_shards, tasks=[TASK], frames=FRAMES, height=SIZE, width=SIZE, edits=[EDIT])
    prepare = partial(write, vae=str(FAMILY / "vae"), text=str(FAMILY))
    bar = progress.add_task("making clips of the new edit", total=samples)
    prepare(
        out / "data" / "train",
        count=samples,
        seed=TRAIN_SEED,
        progress=lambda done: progress.update(bar, completed=done),
    )
    prepare(out / "data" / "val", count=VALIDATION, seed=VALIDATION_SEED, split="held_out")

    config = yaml.safe_dump(fit_config(out, steps), sort_keys=False)
    (out / "fit.yaml").write_text(config)
    # The planner does not know the edit either: what is taught and scored here is the renderer alone.
    before = bench(FAMILY, out, "before", EDIT, held_out, "--no-plan", "--bounds")
    fit = Command(("fit", "-c", str(out / "fit.yaml")), out / "fit.log")
    after = bench(FAMILY, out, "after", EDIT, held_out, "--no-plan", "--lora", out / "fit" / "lora")
    log = out / "fit" / "logs" / "version_0" / "metrics.csv"

    def trained() -> Callable[[], None]:
        bar = progress.add_task("training a LoRA", total=steps)
        return lambda: progress.update(bar, completed=max(curve(log, "train/loss", "").steps, default=-1) + 1)

    folders = {name: RunFolder(out / name) for name in RUNS}
    before.run(watch_scores(folders["before"], "scoring the new edit before", held_out, progress))
    fit.run(trained())
    after.run(watch_scores(folders["after"], "scoring it after", held_out, progress))

    benchmark = ToyBenchmark(tasks=(TASK,), edits=(EDIT,), per_task=held_out, frames=FRAMES, size=SIZE)
    write_animation(out / "edits.webp", sheet(out, benchmark, benchmark.items()[:MOVING]), scale=4)
    charts = [
        Chart("velocity loss, both experts", [curve(log, f"{s}/loss", n) for s, n in STAGES.items()], smoothing=0.9),
        Chart(
            "held-out clips while training, share",
            [curve(log, f"bench/toy/{TASK}/{m}", m.replace("_", " ")) for m in ("edit_done", "rest_unchanged")],
        ),
    ]
    folders |= {name: RunFolder(out / "before" / "bounds" / name) for name in BOUNDS}
    return Lesson(
        {name: cells(folder) for name, folder in folders.items()},
        charts,
        [case_of(out, benchmark, item) for item in benchmark.items()[:SHOWN]],
        [before, fit, after],
        config,
    )


def fit_config(out: Path, steps: int) -> dict[str, Any]:
    """The shipped toy LoRA, reading from and writing into ``out``."""
    text = CONFIG.read_text().replace("${oc.env:RUN,runs/toy-lora}", str(out / "fit"))
    config = yaml.safe_load(text.replace("assets/toy", str(FAMILY)))
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


def curve(path: Path, column: str, name: str) -> Curve:
    """One column of a CSV log."""
    rows = list(csv.DictReader(path.open())) if path.is_file() else []
    points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
    return Curve(name, [step for step, _ in points], [value for _, value in points])


def write_animation(path: Path, pixels: torch.Tensor, scale: int) -> None:
    """Write ``[3, T, H, W]`` uint8 pixels as a looping WebP, enlarged without smoothing."""
    enlarged = pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    first, *others = (Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in enlarged.unbind(1))
    first.save(path, save_all=True, append_images=others, duration=1000 // 16, loop=0, lossless=True)

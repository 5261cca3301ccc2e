"""`bernini demo`: makes toy shards, trains a tiny two-expert renderer, edits clips it has never seen, scores them.

Every step that trains or samples is a `bernini` command over a configuration that is left in the run's folder.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
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

from benchmarks.quality.chart import Chart, Curve
from benchmarks.quality.environment import environment
from benchmarks.quality.report import Case, Report, write_report
from bernini.conversation import Conversation
from bernini.errors import BerniniError, ConfigError
from bernini.media import read_video, write_video
from bernini.vae.codec import LatentCodec
from datamodules.prepare import write_toy_shards
from datamodules.toyworld import items, judge

ROOT = Path(__file__).parents[1]
ASSETS, CONFIG = ROOT / "assets" / "toy", ROOT / "configs" / "toy" / "renderer.yaml"
TASK, EDITS, FRAMES, SIZE, FPS = "v2v", ["recolour"], 9, 64, 16
EXPERTS = ("high", "low")
VALIDATION, HELD_OUT, SHOWN = 32, 48, 12
# Items are numbered from 0 in each world, so that validation and held-out clips need seeds of their own.
TRAIN_SEED, VALIDATION_SEED, HELD_OUT_SEED = 0, 1, 2
SCORES = {
    "edit_done": "the thing that was named has the colour that was asked for",
    "rest_unchanged": "shape, texture, place, background and other things stay",
    "attributes": "attributes of the target that are right",
    "motion": "things that move as in the source",
}


class Failed(BerniniError):
    """A command of the demo that did not succeed."""


@dataclass(frozen=True)
class Command:
    """A `bernini` command that runs on its own.

    Attributes:
        verb: ``fit`` or ``predict``.
        config: Its configuration file.
        log: File that its output goes to.
    """

    verb: str
    config: Path
    log: Path

    @property
    def line(self) -> str:
        """What a user would type."""
        return f"bernini {self.verb} -c {self.config}"

    def start(self, threads: int) -> subprocess.Popen[bytes]:
        """Run it in the background on so many threads."""
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "bernini", self.verb, "-c", str(self.config)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environ,
            )


def wait(commands: Sequence[Command], threads: int, watch: Callable[[], None]) -> None:
    """Run commands side by side; the first that fails ends them all.

    Raises:
        Failed: With the end of the command's log.
    """
    running = {command: command.start(threads) for command in commands}
    try:
        while running:
            time.sleep(0.5)
            watch()
            for command, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[command]
                if process.returncode:
                    tail = "\n".join(command.log.read_text(errors="replace").splitlines()[-12:])
                    raise Failed(f"`{command.line}` failed", where=str(command.log), why=tail)
    finally:
        for process in running.values():
            process.terminate()


def fit_config(out: Path, expert: str, steps: int) -> dict[str, Any]:
    """The shipped toy configuration for one expert, writing into ``out``."""
    config = yaml.safe_load(CONFIG.read_text())
    run = out / expert
    model, trainer = config["model"]["init_args"], config["trainer"]
    model["expert"] = expert
    model["vae"], model["text"] = str(ASSETS / "vae"), {**model["text"], "encoder": str(ASSETS)}
    config["data"]["init_args"] |= {"train": str(out / "data" / "train"), "val": str(out / "data" / "val")}
    trainer |= {
        "max_steps": steps,
        "val_check_interval": max(1, steps // 4),
        "default_root_dir": str(run),
        "enable_progress_bar": False,
    }
    trainer["logger"]["init_args"]["save_dir"] = str(run)
    own: dict[str, dict[str, Any]] = {
        "SaveRenderer": {"folder": str(out / "model")},
        "SampleVideos": {"folder": str(run / "samples"), "every_n_steps": max(1, steps // 2)},
        "ModelCheckpoint": {"dirpath": str(run / "checkpoints"), "every_n_train_steps": steps},
    }
    for callback in trainer["callbacks"]:
        callback["init_args"] |= own.get(callback["class_path"].rsplit(".", 1)[-1], {})
    return config


def predict_config(out: Path) -> dict[str, Any]:
    """Both trained experts over the held-out clips."""
    config = fit_config(out, "both", 1)
    model = config["model"]["init_args"]
    del model["architecture"], model["lr_scheduler"]
    model["init_from"] = str(out / "model")
    config["data"]["init_args"] = {"predict": str(out / "data" / "held_out"), "eval_batch_size": 12}
    kept = ("accelerator", "devices", "enable_model_summary", "use_distributed_sampler")
    config["trainer"] = {key: config["trainer"][key] for key in kept} | {
        "default_root_dir": str(out),
        "enable_progress_bar": False,
        "logger": False,
        "callbacks": [{"class_path": "callbacks.PredictionWriter", "init_args": {"folder": str(out / "edits")}}],
    }
    return config


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """Write a configuration that `bernini` can be given."""
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def log_of(out: Path, expert: str) -> Path:
    """Where Lightning's CSV logger writes an expert's curves."""
    return out / expert / "logs" / "version_0" / "metrics.csv"


def curve(path: Path, column: str, name: str) -> Curve:
    """One column of a CSV log."""
    rows = list(csv.DictReader(path.open())) if path.is_file() else []
    points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
    return Curve(name, [step for step, _ in points], [value for _, value in points])


def held_out_items() -> list[Conversation]:
    """The clips that are edited: none of their combinations of colour, shape and motion was trained on."""
    made = items(
        [TASK], HELD_OUT, seed=HELD_OUT_SEED, frames=FRAMES, height=SIZE, width=SIZE, split="held_out", edits=EDITS
    )
    return list(made)


def pixels_of(item: Conversation, target: bool) -> torch.Tensor:
    """``[3, T, H, W]`` uint8 of an item's target or first source."""
    media = (item.targets if target else item.sources)[0].media
    assert media is not None and media.pixels is not None
    return media.pixels


def means(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each score over the items that have it."""
    names = [name for name in SCORES if any(name in s for s in scores)]
    return {name: sum(s[name] for s in scores if name in s) / sum(name in s for s in scores) for name in names}


def run(out: Path, steps: int, samples: int, progress: Progress) -> dict[str, Any]:
    """Data, training, editing and scoring.

    Args:
        out: Folder of the run, empty.
        steps: Training steps of each expert.
        samples: Training samples.
        progress: Bar to show how far it is.

    Returns:
        What goes into ``metrics.json``; the report is written beside it.
    """
    started = time.monotonic()
    write = partial(write_toy_shards, tasks=[TASK], frames=FRAMES, height=SIZE, width=SIZE, edits=EDITS)
    prepare = partial(write, vae=str(ASSETS / "vae"), text=str(ASSETS))
    bar = progress.add_task("making shards", total=samples)
    data = out / "data"
    prepare(
        data / "train",
        count=samples,
        seed=TRAIN_SEED,
        progress=lambda done: progress.update(bar, completed=done),
    )
    prepare(data / "val", count=VALIDATION, seed=VALIDATION_SEED, split="held_out")
    write(data / "held_out", count=HELD_OUT, seed=HELD_OUT_SEED, split="held_out")

    fits = [
        Command("fit", write_config(out / f"{e}.yaml", fit_config(out, e, steps)), out / f"{e}.log") for e in EXPERTS
    ]
    threads = max(1, torch.get_num_threads() // len(EXPERTS))
    bars = {e: progress.add_task(f"training the {e}-noise expert", total=steps) for e in EXPERTS}

    def watch() -> None:
        for expert, one in bars.items():
            losses = curve(log_of(out, expert), "train/loss", expert)
            if losses.steps:
                progress.update(one, completed=losses.steps[-1] + 1)

    wait(fits, threads, watch)
    for one in bars.values():
        progress.update(one, completed=steps)

    edits = Command("predict", write_config(out / "predict.yaml", predict_config(out)), out / "predict.log")
    bar = progress.add_task("editing held-out clips", total=HELD_OUT)
    listing = out / "edits" / "predictions.jsonl"

    def count() -> None:
        if listing.is_file():
            progress.update(bar, completed=len(listing.read_text().splitlines()))

    wait([edits], torch.get_num_threads(), count)
    count()

    bar = progress.add_task("scoring", total=HELD_OUT)
    metrics, cases, frames = score(out, lambda done: progress.update(bar, completed=done))
    metrics["seconds"] = round(time.monotonic() - started, 1)
    charts = [
        Chart(
            f"velocity loss of the {expert}-noise expert",
            [
                curve(log_of(out, expert), column, name)
                for column, name in (("train/loss", "training"), ("val/loss", "held out"))
            ],
            log_y=True,
            smoothing=0.9,
        )
        for expert in EXPERTS
    ]
    for expert, chart in zip(EXPERTS, charts, strict=True):
        values = chart.curves[0].values
        tenth = max(1, len(values) // 10)
        metrics[f"loss_{expert}"] = {"first": sum(values[:tenth]) / tenth, "last": sum(values[-tenth:]) / tenth}
    facts = environment()
    (out / "metrics.json").write_text(json.dumps({**metrics, "environment": facts}, indent=2) + "\n")
    write_animation(out / "edits.webp", frames, 4)
    commands = [c.line for c in (*fits, edits)]
    write_report(
        summarise(metrics, charts, cases, commands, (out / "high.yaml").read_text(), facts, steps), out / "report.html"
    )
    return metrics


def score(out: Path, progress: Callable[[int], None]) -> tuple[dict[str, Any], list[Case], torch.Tensor]:
    """Read every edited clip with the verifier.

    Returns:
        Mean scores of the edits and of what bounds them, the cases of the report, and a moving sheet
        ``[3, T, H, W]`` of sources over outputs.
    """
    codec = LatentCodec.from_pretrained(ASSETS / "vae")
    scored: dict[str, list[dict[str, float]]] = {"edits": [], "source": [], "ceiling": []}
    cases, sheet = [], []
    for done, item in enumerate(held_out_items(), 1):
        file = out / "edits" / f"{item.key}.mp4"
        output = read_video(file).pixels
        assert output is not None
        source, target = pixels_of(item, target=False), pixels_of(item, target=True)
        scored["edits"].append(judge(item, output))
        scored["source"].append(judge(item, source))
        scored["ceiling"].append(judge(item, codec.decode(codec.normalize(codec.posterior(target)))))
        if done <= SHOWN:
            clips = {name: out / "edits" / f"{item.key}-{name}.mp4" for name in ("source", "target")}
            for clip, pixels in zip(clips.values(), (source, target), strict=True):
                write_video(clip, pixels, FPS)
            shown = {name: scored["edits"][-1][name] for name in SCORES if name in scored["edits"][-1]}
            cases.append(Case(item.key, item.prompt, [*clips.items(), ("output", file)], shown))
            sheet.append(torch.cat([source, output], dim=2))
        progress(done)
    wide = torch.cat(sheet[: SHOWN // 2], dim=3)
    return {name: means(values) for name, values in scored.items()} | {"items": len(scored["edits"])}, cases, wide


def summarise(
    metrics: dict[str, Any],
    charts: Sequence[Chart],
    cases: Sequence[Case],
    commands: Sequence[str],
    config: str,
    facts: dict[str, str],
    steps: int,
) -> Report:
    """The report's contents."""
    edits, source, ceiling = (metrics[name] for name in ("edits", "source", "ceiling"))
    summary = [
        (
            name.replace("_", " "),
            f"{100 * edits[name]:.0f} %",
            f"{text}; unedited {100 * source[name]:.0f} %, best the VAE allows {100 * ceiling[name]:.0f} %",
        )
        for name, text in SCORES.items()
        if name in edits
    ]
    for expert in EXPERTS:
        loss = metrics[f"loss_{expert}"]
        summary.append(
            (f"loss, {expert} noise", f"{loss['last']:.2f}", f"from {loss['first']:.2f}, over {steps} steps")
        )
    return Report(
        title="Bernini demo: a renderer learns to recolour",
        lead=(
            f"A two-expert renderer was trained from random weights on this machine in {metrics['seconds'] / 60:.1f} "
            f"minutes, data and scoring included. It then edited {metrics['items']} clips whose combinations of "
            "colour, shape and motion it had never seen. A verifier that reads pixels alone scored the results."
        ),
        summary=summary,
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
    first.save(path, save_all=True, append_images=others, duration=1000 // FPS, loop=0, lossless=True)


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


def main(argv: Sequence[str]) -> int:
    """Run `bernini demo`."""
    parser = ArgumentParser(prog="bernini demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of each expert (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1600, help="training samples (default: %(default)s)")
    options = parser.parse_args(argv)
    if min(options.steps, options.samples) < 16:
        raise ConfigError("--steps and --samples are at least 16")
    if not (ASSETS / "vae").is_dir():
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
    with Progress(*columns, console=console) as progress:
        metrics = run(options.out, options.steps, options.samples, progress)
    edits = metrics["edits"]
    console.print(
        f"\n{100 * edits['edit_done']:.0f} % of {metrics['items']} unseen edits done, the rest unchanged in "
        f"{100 * edits['rest_unchanged']:.0f} %; {metrics['seconds'] / 60:.1f} minutes\n"
        f"  report   {options.out / 'report.html'}\n  figures  {options.out / 'metrics.json'}\n"
        f"  clips    {options.out / 'edits'}\n  weights  {options.out / 'model'}",
        soft_wrap=True,
    )
    return 0

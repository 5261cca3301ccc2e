"""Prepared samples: how fast one process reads them, and how long the steps of a training run wait for them."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.speed.protocol import Timing
from bernini.conversation import Conversation, Media, Message
from bernini.dropout import DropoutConfig
from bernini.renderer.experts import Architecture
from bernini.renderer.frozen import TextConfig
from bernini.renderer.module import RendererModule
from bernini.vae.module import VAEArchitecture
from datamodules.shards import Shards, write_shards
from datamodules.video import VideoDataModule


@dataclass(frozen=True)
class Shape:
    """What is stored of a sample, which is made from text alone.

    Attributes:
        latent: Frames, height and width of its posterior, (21, 60, 104) of 81 frames of 480 x 832 pixels.
        text_rows: Rows of its text features.
        text_dim: Width of these.
    """

    latent: tuple[int, int, int]
    text_rows: int
    text_dim: int


def write_samples(folder: Path, count: int, shape: Shape) -> Shards:
    """Write samples of random bf16 numbers as `bernini prepare` does those of clips."""

    def samples() -> Iterator[Conversation]:
        generator = torch.Generator().manual_seed(0)
        for number in range(count):
            posterior = torch.randn(32, *shape.latent, generator=generator).bfloat16()
            text = torch.randn(shape.text_rows, shape.text_dim, generator=generator).bfloat16()
            target = Message("video_gen", media=Media(posterior=posterior, fps=16.0))
            messages = [Message("text", text="a clip"), target]
            yield Conversation("t2v", messages, key=f"{number:08d}", text_features={"text": text})

    return write_shards(samples(), folder)


def measure_reading(folder: Path, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Time one process that reads every sample, hashes included; the shards are in memory after a first pass.

    Args:
        folder: Shards.
        rounds: Timed passes.
        say: Told what goes on.

    Returns:
        Milliseconds of a pass, and megabytes per second.
    """
    shards = Shards(folder)
    size = sum(entry.span for entry in shards.entries)
    say(f"{len(shards)} samples of {size / len(shards) / 1e6:.1f} MB, read {rounds} times")
    times = []
    for number in range(rounds + 1):
        began = time.perf_counter()
        for sample in range(len(shards)):
            shards.read(sample).check()
        if number:
            times.append(1e3 * (time.perf_counter() - began))
    timing = Timing.of(times)
    return {"bytes": size, "samples": len(shards), "ms": asdict(timing), "mb_per_second": size / timing.median / 1e3}


class Stopwatch(Callback):
    """Times steps, and what of each passes before its batch is there.

    The device has nothing to do when a batch is asked for, so that all of the wait is its own. A run that does not stop
    for the clock waits less, since there batches come while the device computes.

    Args:
        warmup: First steps that are not counted.
        say: Told of the figures at once: after them, what is on the device goes back to the host's memory.
    """

    def __init__(self, warmup: int, say: Callable[[str], None]) -> None:
        self.left, self.waits, self.steps = warmup + 1, list[float](), list[float]()
        self._began = self._fetched = 0.0
        self._say = say

    def on_train_batch_start(self, *_: Any) -> None:
        """The batch is on the device."""
        self._fetched = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """The step is done, and the next batch is asked for."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.left -= self.left > 0
        if not self.left:
            self.waits.append(1e3 * (self._fetched - self._began))
            self.steps.append(1e3 * (now - self._began))
        self._began = now

    def on_train_end(self, *_: Any) -> None:
        """All steps are done."""
        self._say(f"{sum(self.waits):.0f} of {sum(self.steps):.0f} ms were waiting")


def measure_waiting(
    folder: Path,
    architecture: Architecture,
    device: torch.device,
    workers: int,
    steps: int,
    warmup: int,
    compile: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train a renderer of random weights on shards, as `bernini fit` does, and time what it waits for them.

    Args:
        folder: Shards with features; beside them a VAE is written, of which only statistics are used.
        architecture: Shape of the renderer.
        device: Where it trains.
        workers: Processes that read.
        steps: Timed steps, of one sample each.
        warmup: Untimed steps before them, at least one.
        compile: Compile the blocks.
        say: Told what goes on.

    Returns:
        Milliseconds of a step, of the wait in it, and the share that all waits have of all steps.
    """
    vae = folder / "model" / "vae"
    VAEArchitecture(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).build().save_pretrained(vae)
    model = RendererModule(
        str(vae.parent),
        architecture=architecture,
        text=TextConfig(),
        dropout=DropoutConfig(text=0.0),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True),
        compile=compile,
    )
    watch = Stopwatch(warmup, say)
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if device.type == "cuda" else "32-true",
        max_steps=steps + warmup + 1,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    say(f"{steps} steps after {warmup + 1}, {workers} workers on {os.cpu_count()} processors")
    trainer.fit(model, VideoDataModule(train=str(folder), workers=workers))
    return {
        "workers": workers,
        "step_ms": asdict(Timing.of(watch.steps)),
        "wait_ms": asdict(Timing.of(watch.waits)),
        "wait": sum(watch.waits) / sum(watch.steps),
    }

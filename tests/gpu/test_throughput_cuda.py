"""Throughput on a GPU: it waits for nothing, its sections are the device's, and memory is that of the device."""

import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from cotrainings import EVERY, WIDTH, make_cotraining
from factories import logged_rows
from lightning.pytorch.loggers import CSVLogger
from planners import SIZE, TEXT, TOWER, make_planner

from bernini.peaks import peak_tflops
from bernini.planner.model import PlannerConfig, save_planner
from bernini.planner.module import MLLMConfig
from callbacks import Throughput
from callbacks.timeline import SECTIONS
from datamodules.toyworld.data import ToyWorldDataModule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CYCLES = 200_000_000  # a tenth of a second of an H100, and at least half of one on any GPU

# Heads of 16, the least that FlexAttention takes.
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
MLLM = MLLMConfig({**TEXT, "hidden_size": 64, "rope_parameters": ROPE}, {**TOWER, "out_hidden_size": 64})
ADDED = PlannerConfig(flow_width=32, flow_depth=2, batch_mul=4, gen_dim=WIDTH, mask_tokens=3)


def fit(wan: Path, folder: Path, steps: int, every: int, *callbacks: L.Callback, logger: Any = False) -> None:
    """Planner and both experts in training, in which everything is counted that can be."""
    save_planner(make_planner(mllm=MLLM, planner=ADDED).planner, folder / "planner")
    module = make_cotraining(wan, folder / "planner", EVERY)
    L.Trainer(
        accelerator="cuda",
        devices=1,
        precision="bf16-mixed",
        max_steps=steps,
        limit_val_batches=0,
        log_every_n_steps=every,
        callbacks=list(callbacks),
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(module, ToyWorldDataModule({"t2i": 1, "v2v": 1}, **SIZE, batch_size=4, length=4 * steps, val_length=4))


def waits(wan: Path, folder: Path, *callbacks: L.Callback) -> int:
    """How often a run of four steps waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(wan, folder, 4, 100, *callbacks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def test_a_step_waits_for_the_device_no_more_often_than_without(wan: Path, tmp_path: Path) -> None:
    fit(wan, tmp_path, 4, 100)  # kernels are looked for, which waits
    without = waits(wan, tmp_path)
    assert waits(wan, tmp_path, Throughput()) == without


class Clock(L.Callback):
    """Keeps the device busy in each forward pass, behind the host's back, and looks at the time after each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        torch.cuda._sleep(CYCLES)

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def test_sections_are_those_of_the_device_and_add_up(wan: Path, tmp_path: Path) -> None:
    clock, every = Clock(), 3
    logger = CSVLogger(tmp_path / "logs")
    fit(wan, tmp_path, 4 * every, every, Throughput(), clock, logger=logger)
    peak = torch.cuda.max_memory_allocated() / 2**30
    rows = logged_rows(tmp_path / "logs", "speed")
    assert len(rows) == 4
    for number, row in enumerate(rows[1:], 1):
        took = (clock.times[every * (number + 1) - 1] - clock.times[every * number - 1]) / every
        assert sum(row[f"speed/time/{name}_s"] for name in SECTIONS) == pytest.approx(took, rel=0.1)
        assert row["speed/time/forward_s"] > 0.05
        assert 0 < row["speed/time/optimizer_s"] < 0.05 and row["speed/time/backward_s"] > 0
    assert 0 < rows[-1]["speed/peak_gib"] <= peak * 1.001
    assert rows[-1]["speed/renderer/tokens_per_s"] > 0 and rows[-1]["speed/planner/tokens_per_s"] > 0
    assert ("speed/mfu" in rows[-1]) == (peak_tflops(torch.cuda.get_device_name()) is not None)

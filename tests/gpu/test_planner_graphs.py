"""Planner training from a bank as CUDA graphs: the losses of the same steps without graphs."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from factories import Recorder
from planners import ADDED, TEXT, TOKENIZER, TOWER, VISION
from torch.utils.data import DataLoader

from bernini.bank import Bank, Rows
from bernini.errors import ConfigError
from bernini.planner.bank import join, write
from bernini.planner.banked import BankedPlannerModule
from bernini.planner.model import PlannerConfig
from bernini.planner.module import MLLMConfig
from bernini.planner.vision import VisionConfig
from datamodules.toyworld.data import ToyWorld

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS, SAMPLES, BATCH = 4, 24, 12
TASKS = {"t2i": 1, "v2v": 1, "r2v": 1, "und_img": 1, "und_vid": 1}


def descent(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Steps in proportion to the gradient: Adam would make large ones of differences in rounding."""
    return torch.optim.SGD(parameters, lr=0.02)


def make_module(train_vit: bool, **more: Any) -> BankedPlannerModule:
    return BankedPlannerModule(
        tokenizer=TOKENIZER,
        mllm=MLLMConfig(TEXT, TOWER),
        planner=PlannerConfig(**ADDED),
        vision=VisionConfig(**VISION),
        train_vit=train_vit,
        recompute="none",
        optimizer=descent,
        **more,
    )


class Banked(L.LightningDataModule):
    """A bank of some tasks, and a few batches of its rows."""

    def __init__(self) -> None:
        super().__init__()
        world, template = ToyWorld(TASKS, 9, 32, 32), make_module(False).template
        stack = join([write(world[number], template) for number in range(SAMPLES)])
        self.bank = Bank((stack.map(lambda x: x.to("cuda")),), (BATCH,))

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        rows = [Rows(torch.randint(SAMPLES, (BATCH,), generator=generator), {}) for _ in range(STEPS)]
        return DataLoader(rows, batch_size=None)


def losses(module: L.LightningModule, folder: Path, precision: Any) -> list[float]:
    recorder = Recorder(str(folder / "record"))
    L.Trainer(
        accelerator="cuda",
        devices=1,
        precision=precision,
        max_steps=STEPS,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, Banked())
    return recorder.losses


@pytest.mark.parametrize("compile", [False, True], ids=["eager blocks", "compiled blocks"])
@pytest.mark.parametrize(
    ("precision", "train_vit", "tolerance"),
    [("32-true", False, 1e-4), ("bf16-mixed", False, 1e-2), ("bf16-mixed", True, 1e-2)],
    ids=["fp32", "bf16", "bf16 and tower"],
)
def test_a_banked_planner_learns_the_same_with_and_without_graphs(
    tmp_path: Path,
    recorded: list[torch.nn.Module],
    precision: str,
    train_vit: bool,
    tolerance: float,
    compile: bool,
) -> None:
    def train(cuda_graphs: bool) -> list[float]:
        module = make_module(train_vit, cuda_graphs=cuda_graphs, compile=compile)
        found = losses(module, tmp_path, precision)
        assert all(block._compiled_call_impl is None for block in module.planner.blocks)
        return found

    plain = train(cuda_graphs=False)
    assert len(plain) == STEPS and not recorded
    assert train(cuda_graphs=True) == pytest.approx(plain, rel=tolerance)
    assert len(recorded) == 1


def test_full_precision_trains_the_tower_without_graphs_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be trained in CUDA graphs"):
        losses(make_module(True), tmp_path, "32-true")
    assert len(losses(make_module(True, cuda_graphs=False), tmp_path, "32-true")) == STEPS

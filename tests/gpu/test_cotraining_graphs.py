"""Co-training from a bank as CUDA graphs: the losses of the same steps without graphs, across a stage."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from cotrainings import EVERY, make_cotraining, make_planner_folder
from factories import Recorder
from planners import SIZE

from bernini.cotraining.banked import BankedCoTrainingModule
from bernini.cotraining.conditions import ConditionDropout
from bernini.cotraining.exposure import PlanExposure
from bernini.cotraining.stages import Stage
from datamodules.toyworld.cotrain_bank import ToyCoTrainBankDataModule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 4
TASKS = {"t2i": 1.0, "v2v": 1.0, "rv2v": 1.0, "und_vid": 1.0}


def descent(parameters: Any) -> torch.optim.Optimizer:
    """Steps in proportion to the gradient: Adam would make large ones of differences in rounding."""
    return torch.optim.SGD(parameters, lr=0.02)


def losses(module: L.LightningModule, wan: Path, folder: Path, precision: Any) -> list[float]:
    recorder = Recorder(str(folder / "record"))
    data = ToyCoTrainBankDataModule(
        TASKS, **SIZE, batch_size=12, length=STEPS * 12, val_length=4, vae=str(wan), text=str(wan)
    )
    L.Trainer(
        accelerator="cuda",
        devices=1,
        precision=precision,
        max_steps=STEPS,
        limit_val_batches=0,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)
    return recorder.losses


@pytest.mark.parametrize("compile", [False, True], ids=["eager blocks", "compiled blocks"])
@pytest.mark.parametrize(
    ("precision", "train_vit", "tolerance"),
    [("32-true", False, 1e-4), ("bf16-mixed", False, 1e-2), ("bf16-mixed", True, 1e-2)],
    ids=["fp32", "bf16", "bf16 and tower"],
)
@pytest.mark.parametrize(
    "exposure", [PlanExposure(), PlanExposure(0.3, full=0.2, planned=0.3, noised=0.2)], ids=["paper", "mixed"]
)
def test_banked_cotraining_learns_the_same_with_and_without_graphs(
    wan: Path,
    tmp_path: Path,
    recorded: list[torch.nn.Module],
    exposure: PlanExposure,
    precision: str,
    train_vit: bool,
    tolerance: float,
    compile: bool,
) -> None:
    planner = make_planner_folder(tmp_path / "planner")
    rest: list[Any] = [part for part in EVERY if part != "vit" or train_vit]

    def train(cuda_graphs: bool, seed: int = 0) -> list[float]:
        module = make_cotraining(
            wan,
            planner,
            [],
            BankedCoTrainingModule,
            stages=[Stage(["connector_gen"], until=2), Stage(rest)],
            dropout=ConditionDropout(text=0.3, image=0.3, video=0.3, plan=0.3),
            exposure=exposure,
            optimizer=descent,
            compile=compile,
            cuda_graphs=cuda_graphs,
            seed=seed,
        )
        return losses(module, wan, tmp_path, precision)

    plain = train(cuda_graphs=False)
    assert len(plain) == STEPS and not recorded
    assert train(cuda_graphs=True) == pytest.approx(plain, rel=tolerance)
    assert len(recorded) == 2  # one of each stage
    assert train(cuda_graphs=True, seed=1) != pytest.approx(plain, rel=0.01)  # the noise is drawn within the graphs

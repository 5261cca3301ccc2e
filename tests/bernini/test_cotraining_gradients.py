"""Which parameters get a gradient from each loss and in each stage, exactly."""

from pathlib import Path

import pytest
import torch
from cotrainings import EVERY, NO_DROPOUT, make_cotraining, make_planner_folder
from planners import SIZE

from bernini.conversation import Conversation
from bernini.cotraining.conditions import ConditionDropout
from bernini.cotraining.exposure import PlanExposure
from bernini.cotraining.module import CoTrainingModule
from bernini.cotraining.settings import CoTrainingLoss
from bernini.cotraining.stages import TEACHES
from bernini.planner.masking import MaskRatio
from bernini.planner.planning import PlanningConfig
from datamodules.toyworld import make_item, make_question

HALF = MaskRatio(2000.0, 2000.0)  # hides half of a target's tokens, all but exactly
PARTS = ["connector_gen", "connector_vit", "flow_head", "mask_token", "mllm", "vit", "renderer_high", "renderer_low"]
SAMPLES = {
    "edit": [make_item("v2v", 0, **SIZE)],
    "question": [make_question("und_img", 1, **SIZE)],
    "both": [make_item("v2v", 0, **SIZE), make_question("und_img", 1, **SIZE)],
}
# Parts with gradients that are not zero, if all are trained that the loss can teach. Of ``mllm*`` those of the last
# layer, the final norm and lm_head are: connector and flow head read the states in front of them.
LOSSES = {
    ("ntp", "question"): ["mllm", "vit"],
    ("ntp", "edit"): [],
    ("visual", "edit"): ["connector_vit", "flow_head", "mask_token", "mllm*", "vit"],
    ("visual", "question"): [],
    ("dit", "edit"): ["connector_gen", "mask_token", "mllm*", "vit", "renderer_high", "renderer_low"],
    ("dit", "question"): [],
    ("ntp visual dit", "both"): PARTS,
}
# Parts that a stage names, and what has a gradient then: nothing else does.
STAGES = {
    "connector_gen": ["connector_gen"],
    "connector_vit flow_head mask_token": ["connector_vit", "flow_head", "mask_token"],
    "mask_token": ["mask_token"],
    "mllm": ["mllm"],
    "vit": ["vit"],
    "renderer_high": ["renderer_high"],
    "renderer_low connector_gen": ["renderer_low", "connector_gen"],
    "renderer": ["renderer_high", "renderer_low"],
    " ".join(EVERY): PARTS,
}


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planner's folder."""
    return make_planner_folder(tmp_path_factory.mktemp("planner"))


@pytest.fixture(autouse=True)
def _half_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bernini.planner.learning.MASK_RATIOS", {"v2v": HALF})


def names_of(module: CoTrainingModule, parts: list[str]) -> set[str]:
    own = {p for part in parts for p in module.parts.parameters[part.rstrip("*")]}
    last = ("language_model.layers.2.", "language_model.norm.", "lm_head.")
    return {
        name
        for name, p in module.named_parameters()
        if p in own and not ("mllm*" in parts and any(part in name for part in last))
    }


def make(wan: Path, planner: Path, train: list[str], **weights: float) -> CoTrainingModule:
    loss = CoTrainingLoss(**weights)
    return make_cotraining(wan, planner, train, loss=loss, dropout=ConditionDropout(**NO_DROPOUT))


def backward(module: CoTrainingModule, samples: list[Conversation]) -> None:
    loss, _ = module.losses(samples, [("a", n) for n in range(len(samples))])
    loss.backward()


@pytest.mark.parametrize(("losses", "samples"), LOSSES)
def test_each_loss_teaches_its_parts(wan: Path, planner: Path, losses: str, samples: str) -> None:
    weights = {name: float(name in losses.split()) for name in TEACHES}
    train = [part for part in EVERY if any(part in TEACHES[name] for name in losses.split())]
    module = make(wan, planner, train, **weights)
    backward(module, SAMPLES[samples])
    there = {name for name, p in module.named_parameters() if p.grad is not None}
    moved = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == names_of(module, LOSSES[losses, samples])
    assert there == {name for name, p in module.named_parameters() if p.requires_grad}  # ranks stay in step


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_its_parts(wan: Path, planner: Path, stage: str) -> None:
    module = make(wan, planner, stage.split())
    before = {name: p.clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(module.param_groups(), lr=0.01, weight_decay=0.5)
    backward(module, SAMPLES["both"])
    optimizer.step()
    expected = names_of(module, STAGES[stage])
    assert {name for name, p in module.named_parameters() if p.grad is not None} == expected
    assert {name for name, p in module.named_parameters() if not torch.equal(p, before[name])} == expected
    assert {*optimizer.state} == {p for name, p in module.named_parameters() if name in expected}


def test_gradients_survive_plans_that_mixed_precision_makes_on_the_way(wan: Path, planner: Path) -> None:
    exposure = PlanExposure(visible=0.0, planned=1.0, planning=PlanningConfig(2, 1))
    dropout = ConditionDropout(**NO_DROPOUT)
    module = make_cotraining(wan, planner, EVERY, dropout=dropout, exposure=exposure)
    with torch.autocast("cpu", torch.bfloat16):
        backward(module, SAMPLES["both"])
    moved = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == names_of(module, PARTS)

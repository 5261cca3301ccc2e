"""Plan quality on CUDA: the figures are those of the CPU, and validation plans under mixed precision."""

import copy
from pathlib import Path

import pytest
import torch
from factories import callback, fit
from planners import TEXT, TOKENIZER, TOWER, make_planner, make_planner_config

from benchmarks.quality.plans.__main__ import run
from bernini.planner.model import PlannerConfig
from bernini.planner.module import MLLMConfig
from callbacks import SavePlanner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Heads of 16, the least that FlexAttention takes.
WIDE = {
    **TEXT,
    "hidden_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
}
ADDED = {"flow_width": 32, "flow_depth": 2, "batch_mul": 4, "gen_dim": 20, "mask_tokens": 3}
MLLM = {"text": WIDE, "vision": {**TOWER, "out_hidden_size": 64}}


def test_figures_are_those_of_the_cpu(tmp_path: Path) -> None:
    module = make_planner(mllm=MLLMConfig(**copy.deepcopy(MLLM)), planner=PlannerConfig(**ADDED))
    for parameter in module.planner.vit_decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    SavePlanner(str(tmp_path / "planner")).save(module, write=True)
    size = ["--items=6", "--probe-items=60", "--frames=5", "--size=32", "--steps=4", "--flow-steps=2", "--batch=4"]
    chosen = ["--model", str(tmp_path / "planner"), *size, "--tasks", "t2i", "v2v", "und_vid"]
    cpu, cuda = (run([*chosen, "--device", name, "--out", str(tmp_path / name)]) for name in ("cpu", "cuda"))
    for category, own in cpu["plans"].items():
        for record, other in zip(own["records"], cuda["plans"][category]["records"], strict=True):
            assert {name: other[name] for name in ("key", "asked")} == {name: record[name] for name in ("key", "asked")}
            for name in ("cosine", "error", "spread"):
                assert other[name] == pytest.approx(record[name], rel=1e-2, abs=1e-2)
    assert cuda["answers"] == cpu["answers"]


def test_validation_plans_under_mixed_precision(tmp_path: Path) -> None:
    model = {"mllm": MLLM, "planner": ADDED, "planning": {"steps": 3, "flow_steps": 2}}
    config = make_planner_config(tmp_path, 4, tokenizer=TOKENIZER, **copy.deepcopy(model))
    config["trainer"] |= {"accelerator": "gpu", "precision": "bf16-mixed"}
    config["trainer"]["callbacks"].append(callback("callbacks.PlanPictures", folder=str(tmp_path / "plans")))
    (record,) = fit(config)
    (metrics,) = record["metrics"]
    assert -1 <= metrics["val/plan_cosine"] <= 1 and 0 <= metrics["val/plan_retrieval@1"] <= 1
    assert metrics["val/plan_gallery"] > 1 and len(list((tmp_path / "plans" / "step-000004").iterdir())) > 1

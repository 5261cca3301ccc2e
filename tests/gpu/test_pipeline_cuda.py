"""The pipeline on CUDA: offloaded or not, it makes the same."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import make_conversation
from planners import write_planner_folder

from bernini.pipeline import BerniniPipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = {"steps": 4, "planning_steps": 2, "mode": "vae_txt_vit_wapg"}


def test_weights_that_wait_in_main_memory_make_the_same(wan: Path, tmp_path: Path) -> None:
    shutil.copytree(wan, tmp_path / "model")
    write_planner_folder(tmp_path / "model", gen_dim=12)
    whole = make_conversation(0, "rv2v")
    asked = replace(whole, messages=[m for m in whole.messages if not m.is_target])
    plain = BerniniPipeline.from_pretrained(tmp_path / "model").to("cuda")
    offloaded = BerniniPipeline.from_pretrained(tmp_path / "model")
    offloaded.enable_model_cpu_offload()
    parts = (offloaded.planner, offloaded.text_encoder, offloaded.transformer, offloaded.transformer_2, offloaded.vae)
    for _ in range(2):  # after a call they wait again
        first, second = (pipe(asked, **SETTINGS).videos[0].int() for pipe in (plain, offloaded))
        assert first.shape == (3, 5, 32, 32) and (first - second).abs().max() <= 1
        assert {part.device.type for part in parts} == {"cpu"}

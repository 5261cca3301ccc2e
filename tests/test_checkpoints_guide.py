"""The commands of docs/checkpoints.md as they are written there, with tiny models in the places of large ones."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from planners import ADDED, TEXT, TOKENIZER, TOWER
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig

from bernini.checkpoints.stored import read_folder
from bernini.cli import main
from bernini.planner.model import PlannerConfig, build, load_planner, save_planner
from bernini.renderer.experts import Experts

GUIDE = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_models(wan: Path) -> None:
    """A Wan folder, Bernini-R's separate experts, the full model and two runs."""
    folder = shutil.copytree(wan, Path("models/Wan2.2-T2V-A14B-Diffusers"))
    UniPCMultistepScheduler().save_pretrained(folder / "scheduler")
    shape = PlannerConfig(**{**ADDED, "gen_dim": 12})
    save_planner(build(shape, Qwen2_5_VLConfig(text_config=TEXT, vision_config=TOWER)), Path("planner"))
    shutil.copytree(TOKENIZER, "planner/mllm", dirs_exist_ok=True)
    full = ["planner", str(folder), "--to", "released", "--out", "models/Bernini-Diffusers"]
    assert main(["export", "model", *full]) == 0
    for added, (level, name) in enumerate({"high": "transformer", "low": "transformer_2"}.items(), start=1):
        weights = {key: x + added for key, x in load_file(folder / name / WEIGHTS).items()}
        alone = Path("models/Bernini-R") / f"bernini_renderer_{level}"
        alone.mkdir(parents=True)
        save_file({f"ema.diff_dec.{name}.{key}": x for key, x in weights.items()}, alone / "model.safetensors")
        run = shutil.copytree(folder / name, Path(f"runs/wan22_a14b_{level}/model") / name)
        save_file(weights, run / WEIGHTS, {"format": "pt"})


def test_guide(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_models(wan)
    blocks = re.findall(r"```\n(.*?)```", GUIDE, re.DOTALL)
    commands = [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]
    assert len(commands) >= 5
    for command in commands:
        assert main(command) == 0, command
    models = Path("models")
    before, after = (read_folder(models / name / "bernini") for name in ("Bernini-Diffusers", "again"))
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    base, trained = (Experts.from_pretrained(models / name) for name in ("renderer", "Bernini-R-Diffusers"))
    mine = Experts.from_pretrained(models / "mine").state_dict()
    assert load_planner(models / "mine").state_dict().keys() == load_planner(models / "planner").state_dict().keys()
    for name, x in base.state_dict().items():
        expected = x + (1 if name.startswith("transformer.") else 2)
        assert torch.equal(trained.state_dict()[name], expected)
        assert torch.equal(mine[name], expected.bfloat16().float())

"""The commands and the code of docs/lora.md as they are written there, with tiny models in the places of large ones."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from factories import make_clip
from loras import predict
from transformers import AutoTokenizer, UMT5EncoderModel

from bernini.checkpoints.lora import LoRA, read_lora, write_lora
from bernini.cli import main
from bernini.media import write_video

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "lora.md").read_text()
TINY = ["--trainer.accelerator=cpu", "--trainer.max_steps=1", "--data.workers=0", "--model.text.rows=16"]
SHORT = {
    "prepare": ["--max-edge", "32"],
    "fit": [*TINY, "--data.max_samples=1", "--trainer.accumulate_grad_batches=1"],
    "predict": TINY,
}
STEPS = "--model.sampling.steps=1"


def make_models(wan: Path) -> None:
    """Pipelines of one and of two transformers in ``models/``."""
    for name, second in (("Wan2.1-T2V-1.3B-Diffusers", False), ("Wan2.2-T2V-A14B-Diffusers", True)):
        WanPipeline(
            tokenizer=AutoTokenizer.from_pretrained(wan / "tokenizer"),
            text_encoder=UMT5EncoderModel.from_pretrained(wan / "text_encoder"),
            vae=AutoencoderKLWan.from_pretrained(wan / "vae"),
            scheduler=UniPCMultistepScheduler(),
            transformer=WanTransformer3DModel.from_pretrained(wan / "transformer"),
            transformer_2=WanTransformer3DModel.from_pretrained(wan / "transformer_2") if second else None,
            boundary_ratio=0.875 if second else None,
        ).save_pretrained(Path("models") / name)


def make_clips() -> None:
    Path("clips").mkdir()
    for part, seed in (("src", 0), ("tgt", 1)):
        media = make_clip(seed)
        assert media.pixels is not None
        write_video(Path("clips") / f"a.{part}.mp4", media.pixels, media.fps)
    (Path("clips") / "a.txt").write_text("make it red")


def someones() -> None:
    """A LoRA of rank 16 in ComfyUI's form, with nothing in its header."""
    lora = read_lora(Path("runs/wan21_1.3b_lora/model/pytorch_lora_weights.safetensors"))
    layers = {n: replace(layer, down=layer.down[:16], up=layer.up[:, :16]) for n, layer in lora.layers.items()}
    write_lora(Path("other.safetensors"), LoRA(layers), "comfyui")


def strengthen(file: Path) -> None:
    """Make a LoRA of one step do something that can be measured."""
    lora = read_lora(file)
    layers = {name: replace(layer, up=torch.randn(layer.up.shape) / 10) for name, layer in lora.layers.items()}
    write_lora(file, replace(lora, layers=layers), "diffusers")


def test_guide(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUN", raising=False)
    Path("configs").symlink_to(ROOT / "configs")
    make_models(wan)
    make_clips()
    blocks = re.findall(r"```(\w*)\n(.*?)```", GUIDE, re.DOTALL)
    commands = [shlex.split(line)[1:] for kind, block in blocks if not kind for line in block.splitlines()]
    assert [command[0] for command in commands].count("export") >= 7
    for command in commands:
        if "other.safetensors" in command:
            someones()
        if command[0] == "export" and not Path("loras").exists():
            for file in Path("runs").glob("*/model/*.safetensors"):
                strengthen(file)
        more = SHORT.get(command[0], [])
        assert (
            main([*command, *more, *([STEPS] if "--data.predict" in command or "--data.val" in command else [])]) == 0
        )
    assert sorted(p.name for p in Path("loras").iterdir()) == [
        "again",
        "both",
        "large_high_noise.safetensors",
        "large_low_noise.safetensors",
        "small.safetensors",
    ]
    assert [p.name for p in Path("runs/wan21_1.3b_lora/predictions").glob("*.mp4")] == ["a.mp4"]
    written: dict[str, WanPipeline] = {}
    for kind, block in blocks:
        if kind == "python":
            exec(block.replace("bfloat16", "float32"), written)
    pipe, merged = written["pipe"], Path("models/large-merged")
    for name in ("transformer", "transformer_2"):
        plain, folded = (WanTransformer3DModel.from_pretrained(folder / name) for folder in (wan, merged))
        torch.testing.assert_close(predict(getattr(pipe, name)), predict(folded), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(predict(plain), predict(folded), atol=1e-3)
    assert WanPipeline.from_pretrained("models/small-merged").transformer_2 is None

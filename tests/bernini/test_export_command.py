"""`bernini export`: what people do with a run that ended."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from factories import build, make_config
from loras import predict, trained
from safetensors.torch import load_file, save_file

from bernini.checkpoints.lora import FILES, read_lora
from bernini.cli import main
from bernini.errors import CheckpointError, ConfigError
from bernini.renderer.experts import Experts, load_transformer
from bernini.renderer.lora import save_lora

CONFIG, WEIGHTS = ConfigError.exit_code, CheckpointError.exit_code


@pytest.fixture(scope="module")
def module(wan: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two experts with adapters."""
    folder = tmp_path_factory.mktemp("module")
    return trained(build(make_config(wan, shards, folder, expert="both", lora={"rank": 2, "alpha": 6}), folder)).eval()


@pytest.fixture(scope="module")
def runs(module: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run for each expert, as they train one at a time."""
    folder, experts = tmp_path_factory.mktemp("runs"), module.renderer
    save_lora(Experts(experts.transformer, None), folder / "high" / "model")
    save_lora(Experts(None, experts.transformer_2), folder / "low" / "model")
    return [str(folder / "high"), str(folder / "low")]


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an export that has to fail; gives the message."""

    def export(code: int, *arguments: Any) -> str:
        capfd.readouterr()
        assert main(["export", *map(str, arguments)]) == code
        return capfd.readouterr().err

    return export


def export(*arguments: Any) -> None:
    assert main(["export", *map(str, arguments)]) == 0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_runs_to_comfyui_and_back(module: Any, runs: list[str], tmp_path: Path) -> None:
    export("lora", *runs, "--to", "comfyui", "--out", tmp_path / "loras" / "hat")
    assert names(tmp_path / "loras") == ["hat_high_noise.safetensors", "hat_low_noise.safetensors"]
    files = sorted((tmp_path / "loras").iterdir())
    for order, out in ((files, tmp_path / "a"), (files[::-1], tmp_path / "b")):
        export("lora", *order, "--to", "diffusers", "--out", out)
        assert names(out) == sorted(FILES.values())
        for run, file in zip(runs, FILES.values(), strict=True):
            there, back = load_file(Path(run) / "model" / file), load_file(out / file)
            torch.testing.assert_close(back, there, rtol=0, atol=0)
    assert [read_lora(file).expert for file in files] == ["high", "low"]


def test_single_transformer_needs_no_ending(module: Any, tmp_path: Path) -> None:
    save_lora(Experts(module.renderer.transformer, boundary=0.0), tmp_path)
    file = tmp_path / FILES["transformer"]
    for source, out in ((tmp_path, "a/hat"), (file, "b/hat.safetensors")):
        export("lora", source, "--to", "comfyui", "--out", tmp_path / out, "--dtype", "bfloat16")
        assert names((tmp_path / out).parent) == ["hat.safetensors"]
    stored = load_file(tmp_path / "a" / "hat.safetensors")
    assert {t.dtype for key, t in stored.items() if not key.endswith("alpha")} == {torch.bfloat16}


def test_files_that_do_not_say_their_expert(
    runs: list[str], fails: Callable[..., str], wan: Path, tmp_path: Path
) -> None:
    plain = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for run, name, file in zip(runs, FILES.values(), plain, strict=True):
        save_file(load_file(Path(run) / "model" / name), file)
    message = fails(WEIGHTS, "lora", *plain, "--to", "diffusers", "--out", tmp_path / "out")
    assert "not one for each expert" in message and "--expert high" in message
    message = fails(WEIGHTS, "merged", "--model", wan, "--lora", plain[0], "--out", tmp_path / "out")
    assert "it is for single" in message and "--expert high" in message
    for expert, file in zip(("high", "low"), plain, strict=True):
        export("lora", file, "--to", "diffusers", "--out", tmp_path / "out", "--expert", expert)
    assert names(tmp_path / "out") == sorted(FILES.values())
    assert read_lora(tmp_path / "out" / FILES["transformer_2"]).expert == "low"


def test_merged_model_does_what_the_adapters_do(module: Any, runs: list[str], wan: Path, tmp_path: Path) -> None:
    export("merged", "--model", wan, "--lora", *runs, "--out", tmp_path / "merged")
    for name, model in module.renderer.models.items():
        loaded, report = WanTransformer3DModel.from_pretrained(tmp_path / "merged" / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        torch.testing.assert_close(predict(loaded), predict(model), rtol=1e-5, atol=1e-5)
    assert names(tmp_path) == ["merged"] and names(tmp_path / "merged") == names(wan)
    others = [
        path.relative_to(wan) for path in wan.rglob("*") if path.is_file() and "transformer" not in path.parts[-2]
    ]
    assert len(others) >= 5
    for file in others:
        assert (tmp_path / "merged" / file).read_bytes() == (wan / file).read_bytes()


def test_merging_one_expert_leaves_the_other_and_the_dtype(runs: list[str], wan: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(wan, base)
    (base / ".cache").mkdir()
    load_transformer(wan, "low", torch.bfloat16).save_pretrained(base / "transformer_2")
    export("merged", "--model", base, "--lora", runs[1], "--out", tmp_path / "merged")
    export("merged", "--model", base, "--lora", runs[1], "--out", tmp_path / "half", "--dtype", "float16")
    first, second = (load_file(next((tmp_path / "merged" / n).glob("*.safetensors"))) for n in FILES)
    torch.testing.assert_close(first, load_file(next((wan / "transformer").glob("*.safetensors"))), rtol=0, atol=0)
    assert second["blocks.0.attn1.to_q.weight"].dtype is torch.bfloat16
    half = load_file(next((tmp_path / "half" / "transformer_2").glob("*.safetensors")))
    assert half["blocks.0.attn1.to_q.weight"].dtype is torch.float16
    assert ".cache" not in names(tmp_path / "merged")


def test_merge_that_fails_leaves_nothing(
    runs: list[str], wan: Path, fails: Callable[..., str], shards: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "out" / "merged"
    wide = build(make_config(wan, shards, tmp_path, lora={"rank": 2, "targets": ["proj_out"]}), tmp_path)
    save_lora(Experts(wide.renderer.transformer), tmp_path / "wide")
    other = tmp_path / "wide" / FILES["transformer"]
    save_file({"transformer.blocks.7.attn1.to_q" + key[20:]: t for key, t in load_file(other).items()}, other)
    arguments = ("merged", "--model", wan, "--out", merged, "--lora")
    assert "does not fit the model" in fails(WEIGHTS, *arguments, tmp_path / "wide", "--expert", "high")
    assert "no LoRA weights here" in fails(WEIGHTS, *arguments, tmp_path / "nowhere")
    assert not merged.parent.exists() or not names(merged.parent)
    merged.mkdir(parents=True)
    assert "the folder exists" in fails(CONFIG, *arguments, *runs)
    single = tmp_path / "single"
    shutil.copytree(wan / "transformer", single / "transformer")
    message = fails(WEIGHTS, "merged", "--model", single, "--lora", runs[1], "--out", tmp_path / "new")
    assert "it is for low" in message
    assert "no diffusers model" in fails(
        WEIGHTS, "merged", "--model", tmp_path, "--lora", *runs, "--out", tmp_path / "new"
    )
    assert not (tmp_path / "new").exists()


def test_whole_transformers_for_comfyui(wan: Path, fails: Callable[..., str], tmp_path: Path) -> None:
    export("comfyui", "--model", wan, "--out", tmp_path / "both" / "mine")
    assert names(tmp_path / "both") == ["mine_high_noise.safetensors", "mine_low_noise.safetensors"]
    for file, name in zip(sorted((tmp_path / "both").iterdir()), FILES, strict=True):
        assert "head.modulation" in load_file(file)  # by which ComfyUI and diffusers tell a Wan
        again = WanTransformer3DModel.from_single_file(file, config=str(wan), subfolder=name)
        before = WanTransformer3DModel.from_pretrained(wan / name)
        torch.testing.assert_close(again.state_dict(), before.state_dict(), rtol=0, atol=0)
    shutil.copytree(wan / "transformer_2", tmp_path / "run" / "transformer_2")  # of a run that trained one expert
    export("comfyui", "--model", tmp_path / "run", "--out", tmp_path / "mine", "--dtype", "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "mine_low_noise.safetensors").values()} == {torch.bfloat16}
    weights = next((tmp_path / "run" / "transformer_2").glob("*.safetensors"))
    save_file({**load_file(weights), "blocks.0.attn2.add_k_proj.weight": torch.ones(1)}, weights)
    message = fails(WEIGHTS, "comfyui", "--model", tmp_path / "run", "--out", tmp_path / "other")
    assert "add_k_proj" in message and not list(tmp_path.glob("*other*"))

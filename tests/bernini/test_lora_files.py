"""LoRA files of other tools: read into training, written for diffusers and ComfyUI, equal there and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from factories import build, make_config
from loras import predict, trained
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bernini.checkpoints.lora import EXPERTS, FILES, LoRA, LoRALayer, fold, lora_files, read_lora, write_lora
from bernini.checkpoints.names import diffusers_name, original_name
from bernini.errors import CheckpointError
from bernini.renderer.experts import Architecture
from bernini.renderer.lora import load_lora, save_lora


@pytest.fixture(scope="module")
def module(wan: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two experts with adapters whose alpha is not their rank."""
    folder = tmp_path_factory.mktemp("module")
    return trained(build(make_config(wan, shards, folder, expert="both", lora={"rank": 2, "alpha": 6}), folder)).eval()


@pytest.fixture(scope="module")
def folder(module: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its LoRA files."""
    folder = tmp_path_factory.mktemp("lora")
    save_lora(module.renderer, folder)
    return folder


@pytest.fixture
def single(wan: Path, shards: Path, tmp_path: Path) -> Callable[..., Any]:
    """Builds the first transformer with the LoRA of a file."""

    def start(file: Path, **lora: Any) -> Any:
        lora = {"rank": 2, "init_from": str(file), **lora}
        return build(make_config(wan, shards, tmp_path, lora=lora), tmp_path).eval().renderer.transformer

    return start


def stock(wan: Path, file: Path, name: str = "transformer") -> torch.Tensor:
    """What diffusers' own transformer computes once its own loader has read a file."""
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    models = {name: WanTransformer3DModel.from_pretrained(wan / name) for name in FILES}
    pipeline = WanPipeline(**parts, **models, boundary_ratio=0.875)
    pipeline.load_lora_weights(file, load_into_transformer_2=name == "transformer_2")
    return predict(getattr(pipeline, name))


def same(a: LoRA, b: LoRA) -> None:
    """Equal to the bit."""
    assert a.expert == b.expert and a.layers.keys() == b.layers.keys()
    for name, layer in a.layers.items():
        assert layer.alpha == b.layers[name].alpha
        assert torch.equal(layer.down, b.layers[name].down) and torch.equal(layer.up, b.layers[name].up)


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_names_of_all_tensors_are_those_of_diffusers_own_table() -> None:
    with torch.device("meta"):
        names = list(Architecture().build().state_dict())
    original = {name: original_name(name) for name in names}
    assert len(names) == len(set(original.values())) == 1095 and None not in original.values()
    there = convert_wan_transformer_to_diffusers({value: key for key, value in original.items()})
    assert all(name == key for name, key in there.items()) and there.keys() == set(names)
    assert [diffusers_name(value or "") for value in original.values()] == names


@pytest.mark.parametrize("name", ["blocks.0.attn3.to_q", "blocks.0", "head", "", "attn1.to_q", "blocks.x.attn1.to_q"])
def test_names_that_wan_does_not_have(name: str) -> None:
    assert original_name(name) is None and diffusers_name(name) is None


@pytest.mark.parametrize("name", FILES)
def test_comfyui_file_and_back(module: Any, folder: Path, wan: Path, tmp_path: Path, name: str) -> None:
    lora = read_lora(folder / FILES[name])
    assert lora.expert == EXPERTS[name] and {layer.alpha for layer in lora.layers.values()} == {6}
    comfyui, back = tmp_path / "comfyui.safetensors", tmp_path / FILES[name]
    write_lora(comfyui, lora, "comfyui")
    stored = load_file(comfyui)
    assert len(stored) == 3 * 2 * 10  # of two blocks with ten linear layers each
    assert stored["diffusion_model.blocks.1.cross_attn.o.alpha"].item() == 6
    assert stored["diffusion_model.blocks.0.ffn.0.lora_down.weight"].shape == (2, 32)
    assert stored["diffusion_model.blocks.0.ffn.0.lora_up.weight"].shape == (32, 2)
    same(read_lora(comfyui), lora)
    here = predict(module.renderer.models[name])
    close(stock(wan, comfyui, name), here)  # diffusers' converter of ComfyUI's names, not ours
    write_lora(back, read_lora(comfyui), "diffusers")
    same(read_lora(back), lora)
    assert header(back) == header(folder / FILES[name])
    close(stock(wan, back, name), here)


def original(name: str) -> str:
    found = original_name(name)
    assert found
    return found


# How other trainers call the tensors of a layer: down, up and alpha, if they write alpha.
WRITERS: dict[str, Callable[[str], list[str]]] = {
    "musubi-tuner": lambda n: [
        f"lora_unet_{original(n).replace('.', '_')}.{p}" for p in ("lora_down.weight", "lora_up.weight", "alpha")
    ],
    "diffusion-pipe": lambda n: [f"diffusion_model.{original(n)}.lora_{p}.weight" for p in "AB"],
    "DiffSynth": lambda n: [f"{original(n)}.lora_{p}.default.weight" for p in "AB"],
    "PEFT": lambda n: [f"base_model.model.{n}.lora_{p}.weight" for p in "AB"],
    "bare": lambda n: [f"{n}.lora_{p}.weight" for p in "AB"],
}


@pytest.mark.parametrize("writer", WRITERS)
def test_training_starts_from_what_others_wrote(
    folder: Path, wan: Path, single: Callable[..., Any], tmp_path: Path, writer: str
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in read_lora(folder / FILES["transformer"]).layers.items():
        values = (layer.down, layer.up, torch.tensor(layer.alpha))
        tensors |= dict(zip(WRITERS[writer](name), values, strict=False))
    file = tmp_path / f"{writer}.safetensors"
    save_file(tensors, file)
    assert {layer.alpha for layer in read_lora(file).layers.values()} == {6 if writer == "musubi-tuner" else 2}
    started = predict(single(file))
    assert not torch.allclose(started, predict(WanTransformer3DModel.from_pretrained(wan / "transformer")), atol=1e-3)
    if writer in ("musubi-tuner", "diffusion-pipe"):  # which diffusers reads too
        close(started, stock(wan, file))


@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
@pytest.mark.parametrize("alpha", [None, 1, 6])
def test_training_goes_on_from_the_same_function_under_any_alpha(
    module: Any, folder: Path, single: Callable[..., Any], tmp_path: Path, form: Any, alpha: int | None
) -> None:
    write_lora(tmp_path / "lora.safetensors", read_lora(folder / FILES["transformer"]), form)
    close(predict(single(tmp_path / "lora.safetensors", alpha=alpha)), predict(module.renderer.transformer))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_metadata_is_understood(wan: Path, single: Callable[..., Any], tmp_path: Path, rslora: bool) -> None:
    model = WanTransformer3DModel.from_pretrained(wan / "transformer")
    targets = ["to_q", "ffn.net.2"]
    config = LoraConfig(r=2, lora_alpha=8, alpha_pattern={"ffn.net.2": 3}, use_rslora=rslora, target_modules=targets)
    model.add_adapter(config)
    trained(model)
    layers = get_peft_model_state_dict(model)
    WanPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=config.to_dict())
    file = tmp_path / FILES["transformer"]
    close(predict(single(file, targets=targets)), predict(model))
    write_lora(tmp_path / "comfyui.safetensors", read_lora(file), "comfyui")
    close(stock(wan, tmp_path / "comfyui.safetensors"), predict(model))


@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
def test_ranks_and_alphas_may_differ_between_layers(wan: Path, tmp_path: Path, form: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    model = Architecture(2, 2, 16, 32, 12, 16, 4).build()
    model.load_state_dict(WanTransformer3DModel.from_pretrained(wan / "transformer").state_dict())
    layers = {}
    for i, name in enumerate(("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.0.proj")):
        out, into = model.get_submodule(name).weight.shape
        down, up = (torch.randn(shape, generator=generator) / 4 for shape in ((i + 1, into), (out, i + 1)))
        layers[name] = LoRALayer(down, up, alpha=3.0 - i)
    lora = LoRA(layers)
    write_lora(tmp_path / "lora.safetensors", lora, form)
    same(read_lora(tmp_path / "lora.safetensors"), lora)
    before = predict(model)
    fold(model, lora)
    assert not torch.allclose(predict(model), before, atol=1e-3)
    close(stock(wan, tmp_path / "lora.safetensors"), predict(model))


def test_folded_is_the_adapter(module: Any, folder: Path, wan: Path) -> None:
    for name, model in module.renderer.models.items():
        plain = type(model).from_pretrained(wan / name)
        fold(plain, read_lora(folder / FILES[name]))
        close(predict(plain), predict(model))


def test_folding_rounds_once_and_refuses_other_models(folder: Path, tiny_architecture: Architecture) -> None:
    lora = read_lora(folder / FILES["transformer"])
    with pytest.raises(CheckpointError, match=r"(?s)does not fit the model.*4 layers are not in it or have another"):
        fold(tiny_architecture.build(), lora)  # whose feed-forward is wider
    model = Architecture(2, 2, 16, 32, 12, 16, 4).build().bfloat16()
    weight = model.blocks[0].attn1.to_q.weight.float()
    fold(model, lora)
    delta = lora.layers["blocks.0.attn1.to_q"].delta()
    assert torch.equal(model.blocks[0].attn1.to_q.weight, (weight + delta).bfloat16())


def test_wrong_files_are_refused(folder: Path, single: Callable[..., Any], module: Any, tmp_path: Path) -> None:
    good, bad = load_file(folder / FILES["transformer"]), tmp_path / "bad.safetensors"
    layer = "transformer.blocks.0.attn1.to_q"
    for change, why in (
        ({f"{layer}.lora_magnitude_vector": torch.ones(32)}, "not a plain LoRA"),
        ({f"{layer}.lora_B.bias": torch.ones(32)}, "not a plain LoRA"),
        ({"lora_unet_input_blocks_1.lora_up.weight": torch.ones(2, 2)}, "not a plain LoRA"),
        ({f"{layer}.lora_A.weight": torch.ones(3, 32)}, r"(?s)do not fit each other.*down \[3, 32\], up \[32, 2\]"),
        ({"transformer.proj_out.lora_A.weight": torch.ones(2, 32)}, "do not fit each other"),
    ):
        save_file(good | change, bad)
        with pytest.raises(CheckpointError, match=why) as error:
            read_lora(bad)
        assert str(bad) in error.value.where
    save_file({}, bad)
    with pytest.raises(CheckpointError, match="is empty"):
        read_lora(bad)
    with pytest.raises(CheckpointError, match=r"(?s)rank 2 there, 5 here.*set lora.rank to 2"):
        single(folder / FILES["transformer"], rank=5)
    with pytest.raises(CheckpointError, match=r"(?s)a LoRA of its own.*bernini export lora"):
        load_lora(module.renderer, folder / FILES["transformer"])
    with pytest.raises(CheckpointError, match="ComfyUI knows no such layer"):
        write_lora(
            bad, LoRA({"blocks.0.attn2.add_k_proj": LoRALayer(torch.ones(1, 2), torch.ones(2, 1), 1)}), "comfyui"
        )


def test_files_are_found_in_a_folder_or_in_a_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(folder)
    assert lora_files(tmp_path / "run").keys() == lora_files(folder).keys() == FILES.keys()
    with pytest.raises(CheckpointError, match="no LoRA weights"):
        lora_files(tmp_path)

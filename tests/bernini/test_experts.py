"""Transformers and the folders they are kept in: names, sizes, both ways with diffusers, and clear refusals."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from bernini.errors import CheckpointError, ConfigError
from bernini.renderer.experts import Architecture, Experts, load_transformer
from bernini.renderer.packing import PackedSample, Segment, pack, unpatchify
from bernini.renderer.transformer import PackedWanTransformer3DModel

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("architecture", "tensors", "parameters"),
    [
        (Architecture(), 1095, 14_288_491_584),
        (Architecture(num_layers=30, num_attention_heads=12, ffn_dim=8960), 825, 1_418_996_800),
    ],
)
def test_sizes_and_names_are_those_of_wan(architecture, tensors, parameters):
    with torch.device("meta"):
        ours = architecture.build()
        stock = WanTransformer3DModel(
            num_layers=architecture.num_layers,
            num_attention_heads=architecture.num_attention_heads,
            ffn_dim=architecture.ffn_dim,
        )
    shapes = {name: p.shape for name, p in ours.state_dict().items()}
    assert shapes == {name: p.shape for name, p in stock.state_dict().items()}
    assert len(shapes) == tensors
    assert sum(p.numel() for p in ours.parameters()) == parameters


@pytest.fixture
def folder(tmp_path, tiny_model):
    """A folder with two experts."""
    Experts(tiny_model(0), tiny_model(1)).save_pretrained(tmp_path)
    return tmp_path


def same_weights(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_diffusers_loads_what_is_saved(folder, tiny_model, randn, relative_error):
    assert json.loads((folder / "transformer" / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    stock = WanTransformer3DModel.from_pretrained(folder / "transformer")
    model, draw = tiny_model(0), randn(0)
    assert same_weights(stock, model)
    latent, context = draw(4, 2, 4, 6), draw(5, 12)
    packed = pack([PackedSample([Segment(latent, 0)], context, 700)], model.patch)
    with torch.no_grad():
        ours = unpatchify(model(packed), packed.target_grids[0], model.patch)
        theirs = stock(latent[None], torch.tensor([700]), context[None], return_dict=False)[0][0]
    assert relative_error(ours, theirs) < 1e-6


def test_what_diffusers_saves_is_loaded(tmp_path, tiny_model):
    model = tiny_model(3)
    stock = WanTransformer3DModel(**{k: v for k, v in model.config.items() if not k.startswith("_")})
    stock.load_state_dict(model.state_dict())
    stock.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    loaded = load_transformer(tmp_path, "single")
    assert isinstance(loaded, PackedWanTransformer3DModel)
    assert same_weights(loaded, model)


def test_half_precision_keeps_wans_fp32_modules(folder):
    model = load_transformer(folder, "high", torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    for name in ("scale_shift_table", "blocks.0.norm2.weight", "condition_embedder.time_embedder.linear_1.weight"):
        assert dtypes[name] == torch.float32, name


def test_two_experts_share_the_noise_levels(folder, tiny_model):
    experts = Experts.from_pretrained(folder)
    assert experts.boundary == 0.875
    assert same_weights(experts.at(875), tiny_model(0)) and same_weights(experts.at(874), tiny_model(1))
    (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.9}))
    assert Experts.from_pretrained(folder).boundary == 0.9


def test_one_expert_does_it_all(tmp_path, tiny_model):
    Experts(tiny_model(0), boundary=0.0).save_pretrained(tmp_path)
    assert not (tmp_path / "transformer_2").exists()
    experts = Experts.from_pretrained(tmp_path)
    assert experts.transformer_2 is None
    assert experts.at(0) is experts.at(1000) is experts.transformer


def test_a_renderer_needs_a_transformer():
    with pytest.raises(ConfigError, match="at least one transformer"):
        Experts(None)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        Experts.from_pretrained(tmp_path / "nowhere")
    assert caught.value.where == str(tmp_path / "nowhere" / "transformer" / "config.json")
    assert "init_from" in caught.value.fix


def _without(tensors):
    return {name: x for name, x in tensors.items() if not name.startswith("blocks.1.")}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_without, "missing, e.g. blocks.1."),
        (lambda tensors: {**tensors, "blocks.9.extra": torch.zeros(2)}, "1 unknown, e.g. blocks.9.extra"),
        (lambda tensors: {**tensors, "proj_out.weight": torch.zeros(3, 3)}, "proj_out.weight expected shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, why, folder):
    weights = folder / "transformer_2" / WEIGHTS
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    load_transformer(folder, "high")
    with pytest.raises(CheckpointError) as caught:
        Experts.from_pretrained(folder)
    assert "low expert" in caught.value.what
    assert caught.value.where == str(folder / "transformer_2")
    assert why in caught.value.why and caught.value.fix


def test_damaged_files_are_refused(folder):
    (folder / "transformer" / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="the high expert cannot be read"):
        load_transformer(folder, "high")
    (folder / "transformer_2" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a valid JSON"):
        load_transformer(folder, "low")


def test_pickles_are_not_opened(folder, tiny_model):
    weights = folder / "transformer" / WEIGHTS
    weights.unlink()
    torch.save(tiny_model(0).state_dict(), weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"no file named .*safetensors"):
        load_transformer(folder, "high")

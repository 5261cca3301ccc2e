"""The renderer against numbers of the released implementation and against diffusers' own model."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from bernini.flow.guidance import APG, PLANNED_MODES, Context, Omegas
from bernini.flow.solvers import UniPC
from bernini.renderer.experts import Experts
from bernini.renderer.packing import PackedSample, Segment, pack, unpatchify
from bernini.renderer.sampling import RenderRequest, SamplingConfig, Source, render


@pytest.fixture(scope="module")
def forward_golden(goldens):
    return load_file(goldens / "renderer_forward.safetensors")


@pytest.fixture(scope="module")
def golden_pack(forward_golden):
    g = forward_golden
    names = [["video", "ref", "target"], ["target"], [*(f"ref{i}" for i in range(7)), "target"]]
    samples = []
    for i, order in enumerate(names):
        ids = g[f"sample{i}.source_ids"].tolist()
        segments = [Segment(g[f"sample{i}.{name}"], source_id) for name, source_id in zip(order, ids, strict=True)]
        samples.append(PackedSample(segments, g[f"sample{i}.context"], g["timesteps"][i]))
    return pack(samples, (1, 2, 2))


def test_golden_forward(golden_model, forward_golden, golden_pack, relative_error):
    with torch.no_grad():
        out = golden_model("high")(golden_pack)
    assert relative_error(out, forward_golden["all_out"]) < 1e-5
    assert relative_error(out[golden_pack.target_index], forward_golden["target_out"]) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_gradients(golden_model, forward_golden, golden_pack, relative_error, checkpointing):
    model = golden_model("high").train()
    model.gradient_checkpointing = checkpointing
    (model(golden_pack)[golden_pack.target_index] * forward_golden["probe"]).sum().backward()
    parameters = dict(model.named_parameters())
    names = [key.removeprefix("grad.") for key in forward_golden if key.startswith("grad.")]
    assert len(names) == 7
    for name in names:
        assert relative_error(parameters[name].grad, forward_golden[f"grad.{name}"]) < 1e-4, name


SOURCES = {
    "rv2v": ["video", "ref0", "ref1"],
    "v2v": ["video"],
    "v2v_apg": ["video"],
    "v2v_chain": ["video", "video2"],
    "r2v_apg": ["ref0", "ref1"],
    "t2v": [],
    "t2v_apg": [],
    "rv2v_many": ["video", *["ref0", "ref1"] * 3],
}


@pytest.mark.parametrize("run", SOURCES)
def test_golden_sampling(run, goldens, golden_model, relative_error):
    g = load_file(goldens / "renderer_sample.safetensors")
    spec = json.loads((goldens / "renderer_sample.json").read_text())[run]
    request = RenderRequest(
        shape=(16, 3, 4, 6),
        sources=[Source(g[name], name.startswith("video")) for name in SOURCES[run]],
        contexts={Context("positive", plan=False): g["pos"], Context("negative", plan=False): g["neg"]},
        mode=spec["guidance_mode"],
        seed=spec["seed"],
    )
    config = SamplingConfig(
        steps=spec["num_inference_steps"],
        shift=spec["flow_shift"],
        omegas=Omegas(**{name: spec[f"omega_{name}"] for name in ("vid", "img", "txt", "scale")}),
        apg=APG(spec["eta"], spec["norm_threshold"][0], spec["momentum"]),
    )
    (latent,) = render(Experts(golden_model("high"), golden_model("low")), [request], config)
    assert relative_error(latent, g[f"out.{run}"]) < 1e-4


CONTEXTS = {
    "wotxt_wovit": Context("negative", plan=False),
    "wtxt_wovit": Context("positive", plan=False),
    "wotxt_wvit": Context("negative", plan=True),
    "wtxt_wvit": Context("positive", plan=True),
}


@pytest.mark.parametrize("run", sorted(PLANNED_MODES.keys() - {"rv2v_projected"}))
def test_golden_sampling_with_a_plan(run, goldens, golden_model, relative_error):
    g = load_file(goldens / "bernini_sample.safetensors")
    spec = json.loads((goldens / "bernini_sample.json").read_text())[run]
    request = RenderRequest(
        shape=(16, 3, 4, 6),
        sources=[Source(g[name], name == "video") for name in ("video", "ref0", "ref1")],
        contexts={context: g[f"ctx.{name}"] for name, context in CONTEXTS.items()},
        mode=spec["guidance_mode"],
        seed=spec["seed"],
    )
    omegas = Omegas(**{name: spec[f"omega_{name}"] for name in ("vid", "img", "txt", "tgt", "scale")})
    config = SamplingConfig(steps=spec["num_inference_steps"], shift=spec["flow_shift"], omegas=omegas)
    (latent,) = render(Experts(golden_model("high"), golden_model("low")), [request], config)
    assert relative_error(latent, g[f"out.{run}"]) < 1e-4


def test_golden_sigmas(goldens):
    g = load_file(goldens / "renderer_sample.safetensors")
    grid = UniPC(8, 5.0)
    assert grid.sigmas == pytest.approx(g["sigmas_shift5_n8"].tolist(), abs=1e-6)
    assert grid.timesteps == g["timesteps_shift5_n8"].tolist()


def _stock(model) -> WanTransformer3DModel:
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    stock = WanTransformer3DModel(**config)
    stock.load_state_dict(model.state_dict())
    return stock.to(next(model.parameters()).dtype).eval()


@pytest.mark.parametrize("source", ["golden", "tiny"])
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 6, 10), (5, 10, 6)])
def test_target_alone_is_stock_wan(source, shape, golden_model, tiny_model, randn, relative_error):
    model = (golden_model("high") if source == "golden" else tiny_model()).eval()
    draw = randn(3)
    latent = draw(model.config.in_channels, *shape)
    context = draw(7, model.config.text_dim)
    packed = pack([PackedSample([Segment(latent, 0)], context, 437.5)], model.patch)
    with torch.no_grad():
        ours = unpatchify(model(packed), packed.target_grids[0], model.patch)
        stock = _stock(model)(latent[None], torch.tensor([437.5]), context[None], return_dict=False)[0][0]
    assert relative_error(ours, stock) < 1e-6

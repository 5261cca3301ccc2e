"""The planner as one model: released names and shapes, checkpoints there and back, and what a packed forward gives."""

from pathlib import Path

import pytest
import torch
from planners import ADDED, TEXT, TOWER
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig

from bernini.errors import CheckpointError, DataError
from bernini.planner.masking import TARGET
from bernini.planner.model import (
    FILE,
    FOLDER,
    PlannerConfig,
    PlannerModel,
    build,
    load_planner,
    released_name,
    save_planner,
)
from bernini.planner.planning import PlanningConfig
from bernini.planner.template import PlannerSample, pack
from bernini.planner.vision import VisionConfig, Visual

SMALL = PlannerConfig(**ADDED)
VISION = VisionConfig(patch=8)
IMAGE = 290  # a pad


@pytest.fixture
def model() -> PlannerModel:
    torch.manual_seed(0)
    return build(SMALL, Qwen2_5_VLConfig(text_config=TEXT, vision_config=TOWER)).eval()


def make_sample(seed: int, sources: int, words: int = 5, labels: bool = False) -> PlannerSample:
    """Text, sources of four tokens, and a target of four tokens unless it is a chat."""
    draw = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(16, VISION.columns, generator=draw) for _ in range(sources + 1)]
    visuals = [Visual(patches, (1, 4, 4), False, VISION) for patches in drawn]
    ids, kinds, segments = [], [], []
    for number in range(1, sources + 1):
        ids += [IMAGE] * 4
        kinds += [2] * 4
        segments += [number] * 4
    text = torch.randint(2, 280, (words,), generator=draw).tolist()
    segments += range(len(ids), len(ids) + words)
    ids += text
    kinds += [0] * words
    if labels:
        visuals = visuals[:sources]
    else:
        ids += [IMAGE] * 4
        kinds += [TARGET] * 4
        segments += [sources + 1] * 4
    learned = [-100] * (len(ids) - 2) + ids[-2:] if labels else [-100] * len(ids)
    positions = torch.arange(len(ids)).expand(3, -1)
    tensors = (torch.tensor(x) for x in (ids, kinds, segments))
    return PlannerSample(*tensors, positions, torch.tensor(learned), visuals, None if labels else (1, 2, 2))


def test_the_released_size_has_the_released_tensors() -> None:
    text = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    text |= {"intermediate_size": 18944, "vocab_size": 152064}
    vision = {"out_hidden_size": 3584, "hidden_size": 1280, "depth": 32, "intermediate_size": 3420, "num_heads": 16}
    with torch.device("meta"):
        whole = build(PlannerConfig(), Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    shapes = {released_name(name): tuple(x.shape) for name, x in whole.state_dict().items()}
    parts = ("mllm.", "vit_decoder.", "connector.", "mask_tokens")
    assert [sum(name.startswith(part) for name in shapes) for part in parts] == [729, 140, 12, 1]
    assert sum(name.startswith("mllm.visual.") for name in shapes) == 390
    assert sum(name.startswith("mllm.model.") for name in shapes) == 338
    assert shapes["mllm.model.embed_tokens.weight"] == shapes["mllm.lm_head.weight"] == (152064, 3584)
    assert shapes["vit_decoder.net.res_blocks.15.adaLN_modulation.1.weight"] == (12288, 4096)
    assert shapes["connector.proj_gen.0.weight"] == (4096, 3584)
    assert shapes["mask_tokens"] == (1, 4096, 3584)


def test_checkpoints_go_there_and_back(model: PlannerModel, tmp_path: Path) -> None:
    save_planner(model, tmp_path)
    names = load_file(tmp_path / FOLDER / FILE).keys()
    assert "mllm.visual.patch_embed.proj.weight" in names and "mllm.model.layers.0.mlp.up_proj.weight" in names
    again = load_planner(tmp_path)
    assert again.config.flow_width == SMALL.flow_width and again.config.gen_dim == SMALL.gen_dim
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
    samples = pack([make_sample(0, 1), make_sample(1, 2, labels=True)])
    with torch.no_grad():
        outputs = [one(samples, one.see(samples.visuals)) for one in (model, again)]
    assert torch.equal(outputs[0].hidden, outputs[1].hidden) and torch.equal(outputs[0].logits, outputs[1].logits)


def test_what_weights_do_not_tell_is_configured(model: PlannerModel, tmp_path: Path) -> None:
    save_planner(model, tmp_path)
    config = load_planner(tmp_path, config=PlannerConfig(flow_shift=3.0, batch_mul=5)).vit_decoder.config
    assert (config.shift, config.batch_mul, config.width) == (3.0, 5, SMALL.flow_width)


def test_the_renderers_tensors_are_left_and_missing_ones_told(model: PlannerModel, tmp_path: Path) -> None:
    save_planner(model, tmp_path)
    tensors = load_file(tmp_path / FOLDER / FILE)
    save_file({**tensors, "diff_dec.transformer.proj_out.weight": torch.zeros(2)}, tmp_path / FOLDER / FILE)
    load_planner(tmp_path)
    del tensors["connector.pred_vit.0.bias"]
    save_file(tensors, tmp_path / FOLDER / FILE)
    with pytest.raises(CheckpointError, match=r"1 missing, e\.g\. connector\.pred_vit\.0\.bias"):
        load_planner(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_planner(tmp_path / "elsewhere")


def test_packed_samples_are_what_they_are_alone(model: PlannerModel) -> None:
    samples = [make_sample(0, 1), make_sample(1, 0), make_sample(2, 2, labels=True)]
    with torch.no_grad():
        whole = model(pack(samples), model.see(pack(samples).visuals))
        alone = [model(pack([s]), model.see(s.visuals)) for s in samples]
    torch.testing.assert_close(whole.hidden, torch.cat([one.hidden for one in alone]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.logits, alone[2].logits, rtol=1e-5, atol=1e-5)
    assert whole.labels.tolist() == samples[2].ids[-2:].tolist() and not len(alone[0].logits)


def test_hidden_tokens_show_nothing_of_themselves(model: PlannerModel) -> None:
    samples = pack([make_sample(0, 1)])
    features = model.see(samples.visuals)
    masked = samples.token_type == TARGET
    masked[-1] = False
    other = features.clone()
    other[4:7] += 1.0  # the hidden tokens' truth
    with torch.no_grad():
        hidden = [model(samples, x, masked).hidden for x in (features, other)]
        shown = model(samples, torch.cat([features[:-1], features[-1:] + 1]), masked).hidden
    assert torch.equal(*hidden)
    assert not torch.equal(shown, hidden[0])


def test_streams_become_a_plan(model: PlannerModel) -> None:
    cond, bare = make_sample(0, 1), make_sample(0, 0)
    [request] = model.requests([{"cond": cond, "uncond": bare, "imgcond": bare}], seeds=[3])
    assert request.imgcond is not None and request.grid == (1, 2, 2)
    (plan,) = model.planner().plan([request], PlanningConfig(steps=2, flow_steps=2))
    assert plan.embeds.shape == (4, 32) and plan.wtxt_wvit.shape == (len(cond), 20)
    assert model.requests([{"cond": bare, "uncond": bare, "imgcond": bare}], seeds=[3])[0].imgcond is None
    # What the target really shows is not looked at.
    cond.visuals[-1] = make_sample(9, 0).visuals[0]
    (again,) = model.planner().plan(
        model.requests([{"cond": cond, "uncond": bare, "imgcond": bare}], [3]), PlanningConfig(2, 2)
    )
    assert torch.equal(again.embeds, plan.embeds)


def test_requests_that_are_made_together_are_those_made_alone(model: PlannerModel) -> None:
    samples = [(make_sample(n, n, words=3 + n), make_sample(n, 0, words=3 + n)) for n in range(3)]
    asked = [{"cond": cond, "uncond": bare, "imgcond": bare} for cond, bare in samples]
    together = model.requests(asked, seeds=range(3))
    assert [request.imgcond is None for request in together] == [True, False, False]
    for number, request in enumerate(together):
        [alone] = model.requests(asked[number : number + 1], seeds=[number])
        assert request.seed == alone.seed == number
        for own, other in ((request.cond, alone.cond), (request.uncond, alone.uncond)):
            assert torch.allclose(own.embeds, other.embeds, atol=1e-6)
            assert torch.equal(own.position_ids, other.position_ids) and torch.equal(own.target, other.target)


def test_wrong_features_are_refused(model: PlannerModel) -> None:
    samples = pack([make_sample(0, 1)])
    with pytest.raises(DataError, match=r"shape \[8, 31\], expected \[8, 32\]"):
        model(samples, torch.zeros(8, 31))

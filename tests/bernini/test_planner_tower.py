"""The vision tower with all segments in one call, against transformers' own attention one by one."""

import pytest
import torch
from planners import VISION, make_planner, make_planner_samples
from torch import Tensor
from transformers import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from bernini.planner import tower as ours
from bernini.planner.tower import attend_at_once, embed, fingerprint
from bernini.planner.vision import VisionConfig, Visual

PATCH = 8
GRIDS = [(1, 4, 4), (3, 6, 4), (1, 4, 4), (2, 10, 14), (1, 2, 6), (1, 8, 8)]  # windows of 4 x 4 patches, whole and cut
CONFIG = {
    "out_hidden_size": 12,
    "hidden_size": 32,
    "depth": 3,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": PATCH,
    "window_size": 4 * PATCH,
    "fullatt_block_indexes": [1],
}


@pytest.fixture
def tower() -> Qwen2_5_VisionTransformerPretrainedModel:
    torch.manual_seed(0)
    model = Qwen2_5_VisionTransformerPretrainedModel._from_config(Qwen2_5_VLVisionConfig(**CONFIG))
    attend_at_once(model)
    return model


def make_visuals(grids: list[tuple[int, int, int]] = GRIDS, dtype: torch.dtype = torch.float32) -> list[Visual]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(t * h * w, 3 * 2 * PATCH**2) for t, h, w in grids]
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [Visual(x, grid, grid[0] > 1, VisionConfig(**VISION)) for x, grid in zip(drawn, grids, strict=True)]


def as_transformers(model: Qwen2_5_VisionTransformerPretrainedModel, visuals: list[Visual], attention: str) -> Tensor:
    """The tower as transformers drives it."""
    model.config._attn_implementation = attention
    patches = torch.cat([visual.patches for visual in visuals])
    found = model(patches, grid_thw=torch.tensor([visual.grid for visual in visuals])).pooler_output
    attend_at_once(model)
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_one_call_gives_what_transformers_gives(tower, attention):
    visuals = make_visuals()
    found, expected = embed(tower, visuals), as_transformers(tower, visuals, attention)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    grads = [torch.autograd.grad((out * weights).sum(), list(tower.parameters())) for out in (found, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def test_each_layer_attends_once(tower, monkeypatch):
    calls: list[int] = []
    attend = ours._by_length

    def counted(*args: Tensor) -> Tensor:
        calls.append(len(args[3]) - 1)
        return attend(*args)

    monkeypatch.setattr(ours, "_by_length", counted)
    embed(tower, make_visuals())
    frames = sum(t for t, _, _ in GRIDS)
    windows = sum(t * -(-h // 4) * -(-w // 4) for t, h, w in GRIDS)
    assert calls == [windows, frames, windows]


def test_visuals_do_not_see_each_other(tower):
    visuals = make_visuals()
    alone = torch.cat([embed(tower, [visual]) for visual in visuals])
    torch.testing.assert_close(embed(tower, visuals), alone, rtol=1e-5, atol=1e-6)
    assert embed(tower, []).shape == (0, CONFIG["out_hidden_size"])
    embed(tower, []).sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in tower.parameters())


def test_fingerprints_tell_towers_apart(tower):
    first = fingerprint(tower)
    assert fingerprint(tower.bfloat16()) == first
    with torch.no_grad():
        tower.blocks[1].mlp.up_proj.weight.mul_(1.01)
    assert fingerprint(tower) != first


@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_tower_has_no_part_in_the_backward_pass(trained):
    module, (sample, *_) = make_planner(train_vit=trained), make_planner_samples()
    assert module.planner.tower.blocks[0].gradient_checkpointing
    assert module.planner.see(module.template(sample).visuals).requires_grad == trained

"""The vision tower on CUDA: FlashAttention over all segments gives what transformers' own attention gives."""

import copy

import pytest
import torch
from transformers import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from bernini.planner import tower as ours
from bernini.planner.tower import SEGMENTS, embed
from bernini.planner.vision import VisionConfig, Visual

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GRIDS = [(1, 4, 4), (3, 6, 4), (2, 10, 14), (1, 2, 6)]
CONFIG = Qwen2_5_VLVisionConfig(
    out_hidden_size=12, hidden_size=32, depth=3, intermediate_size=24, num_heads=2, window_size=56,
    fullatt_block_indexes=[1],
)  # fmt: skip
NUMBERS = VisionConfig()


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance", "grouped"),
    [
        (torch.float32, False, 1e-4, 3),
        (torch.bfloat16, False, 8e-2, 0),
        (torch.float32, True, 8e-2, 0),
        (torch.float16, False, 1e-2, 0),
    ],
)
def test_segments_attend_alike(dtype, autocast, tolerance, grouped, relative_error, monkeypatch):
    torch.manual_seed(0)
    tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(copy.deepcopy(CONFIG)).to("cuda", dtype)
    visuals = [Visual(torch.randn(t * h * w, NUMBERS.columns), (t, h, w), t > 1, NUMBERS) for t, h, w in GRIDS]
    calls = []
    attend = ours._by_length
    monkeypatch.setattr(ours, "_by_length", lambda *args: calls.append(1) or attend(*args))
    found = []
    for attention in ("sdpa", SEGMENTS):
        tower.config._attn_implementation = attention
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = embed(tower, visuals)
        grads = torch.autograd.grad(out.float().square().sum(), list(tower.parameters()))
        found.append([out, *grads])
    assert len(calls) == grouped  # the others went through FlashAttention
    for theirs, mine in zip(*found, strict=True):
        if theirs.norm() > 1e-6:
            assert relative_error(mine.float(), theirs.float()) < tolerance

import copy

import pytest
import torch

from bernini.float8 import CAPABILITY, compute_in_float8
from bernini.renderer.experts import Architecture
from bernini.renderer.packing import PackedSample, Segment, pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY, reason="needs a GPU with fp8"
    ),
]

CUDA = torch.device("cuda")


@pytest.mark.parametrize("compiled", [False, True])
def test_any_number_of_tokens_learns_nearly_the_same(relative_error, compiled):
    pytest.importorskip("torchao.float8")
    torch.manual_seed(0)
    with CUDA:
        plain = Architecture(
            num_layers=2, num_attention_heads=8, attention_head_dim=128, ffn_dim=3072, text_dim=64, in_channels=4
        ).build()
    rounded = copy.deepcopy(plain)
    compute_in_float8(rounded.blocks)
    if compiled:
        rounded.compile_repeated_blocks()
    for size in ((5, 30, 30), (3, 26, 38)):  # 1125 and 741 tokens
        latent, text = torch.randn(4, *size, device=CUDA), torch.randn(77, 64, device=CUDA)
        packed = pack([PackedSample([Segment(latent, 0)], text, 500.0)], (1, 2, 2))
        gradients = []
        for model in (plain, rounded):
            model.enable_gradient_checkpointing()
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(packed).float().square().mean()
            loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.blocks.parameters()]))
        assert 1e-3 < relative_error(gradients[1], gradients[0]) < 0.2

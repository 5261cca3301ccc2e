"""What is recomputed changes no gradient, and takes the memory that is reckoned."""

import copy
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from bernini.memory import Activations, States, needs
from bernini.renderer.experts import Architecture
from bernini.renderer.packing import Pack, PackedSample, Segment, pack
from bernini.renderer.recompute import Recompute
from bernini.renderer.transformer import PackedWanTransformer3DModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
WAYS = get_args(Recompute)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
CLIP, EDIT, IMAGE = ([(5, 16, 24)], 40), ([(5, 16, 24), (1, 16, 24)], 77), ([(1, 32, 16)], 512)
PACKS = {"one": [EDIT], "several": [CLIP, EDIT, EDIT, IMAGE]}


def packed(samples: list[tuple[list[tuple[int, int, int]], int]], text: int) -> Pack:
    generator = torch.Generator(CUDA).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=CUDA)

    return pack(
        [
            PackedSample([Segment(draw(4, *size), i) for i, size in enumerate(sizes)], draw(rows, text), 500.0)
            for sizes, rows in samples
        ],
        (1, 2, 2),
    )


def build(shape: Architecture) -> PackedWanTransformer3DModel:
    torch.manual_seed(0)
    with CUDA:
        model = shape.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def step(model: PackedWanTransformer3DModel, given: Pack) -> Tensor:
    """Output and gradients laid end to end."""
    model.zero_grad()
    out = model(given).float()
    out.square().mean().backward()
    return torch.cat([out.detach().flatten(), *(p.grad.float().flatten() for p in model.parameters())])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PACKS)
def test_gradients_do_not_depend_on_what_is_recomputed(
    name: str, dtype: torch.dtype, relative_error: Callable[[Tensor, Tensor], float]
) -> None:
    shape = Architecture(
        num_layers=3, num_attention_heads=2, attention_head_dim=128, ffn_dim=512, text_dim=64, in_channels=4
    )
    model, given = build(shape).to(dtype), packed(PACKS[name], 64)
    expected = step(model, given)
    assert expected.isfinite().all()
    for compiled in (False, True):
        one = copy.deepcopy(model)
        if compiled:
            one.compile_repeated_blocks(fullgraph=True)
        for way in WAYS:
            one.recompute = way
            for _ in range(2):  # memory that the first pass has left holds something else
                assert relative_error(step(one, given), expected) < TOLERANCE[dtype], (way, compiled)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_takes_what_is_reckoned(compiled: bool) -> None:
    shape = Architecture(num_layers=6, num_attention_heads=12, ffn_dim=8960, text_dim=64, in_channels=4)
    given = packed([([(16, 32, 64)], 512)], 64)
    model = build(shape)
    if compiled:
        model.compile_repeated_blocks()
    states = States.of([model], mixed=not compiled, optimizer=0)
    activations = Activations.of(shape, given.tokens, compiled)
    need, base = needs(states, activations, accumulates=False), torch.cuda.memory_allocated() - states.weights
    for way in ("pointwise", "attention", "full", "offload"):
        model.recompute = way
        for _ in range(2):  # libraries take their workspaces in the first
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(given).float().square().mean()
            held = torch.cuda.memory_allocated() - before
            loss.backward()
        peak = torch.cuda.max_memory_allocated() - base
        assert peak <= 1.05 * need[way], way
        if way == "pointwise":
            assert held == pytest.approx(activations.kept[way] + activations.head, rel=0.05)

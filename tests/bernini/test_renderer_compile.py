import copy

import pytest
import torch
from torch._dynamo.utils import counters

from bernini.renderer.packing import PackedSample, Segment, pack


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _pack(model, draw, *samples):
    """Samples as (latent sizes..., text rows); segments get ids 0, 1, ..."""
    return pack(
        [
            PackedSample([Segment(draw(4, *s), i) for i, s in enumerate(sizes)], draw(rows, 12), 500.0)
            for *sizes, rows in samples
        ],
        model.patch,
    )


def test_compiled_blocks_compute_what_eager_ones_do(tiny_model, randn, relative_error):
    eager = tiny_model()
    compiled = copy.deepcopy(eager)
    # With one sample nothing leaves the graph. Kernels are generated and compared in tests/gpu.
    compiled.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert list(compiled.state_dict()) == list(eager.state_dict())
    packed = _pack(eager, randn(0), ((3, 4, 6), (1, 4, 4), 7))
    outputs = []
    for model in (eager, compiled):
        model.enable_gradient_checkpointing()
        outputs.append(model(packed))
        outputs[-1].square().mean().backward()
    assert relative_error(outputs[1], outputs[0]) < 1e-6
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("recompute", ["none", "pointwise", "full"])
def test_neither_lengths_nor_number_of_samples_compile_anew(recompute, tiny_model, randn, relative_error):
    eager = tiny_model()
    compiled = copy.deepcopy(eager)
    compiled.recompute = recompute
    compiled.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    draw = randn(0)
    a, b, c, d = ((3, 4, 6), 5), ((1, 4, 4), (2, 4, 4), 7), ((2, 6, 6), 3), ((1, 2, 4), 2)
    counters.clear()
    made = []
    for samples in ([a], [c], [d], [b], [b, c, d], [a, b], [d, c, b, a], [a, d]):
        packed = _pack(eager, draw, *samples)
        for model in (eager, compiled):
            model.zero_grad()
            out = model(packed)
            out.square().mean().backward()
            found = torch.cat([p.grad.flatten() for p in model.parameters()])
            if model is eager:
                expected = out, found
        assert relative_error(out, expected[0]) < 1e-6 and relative_error(found, expected[1]) < 1e-6
        made.append(counters["stats"]["unique_graphs"])
    # One for single samples and one for several; the first of them are enough.
    assert made == [1, 1, 1, 1, 2, 2, 2, 2]

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

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


def test_neither_lengths_nor_number_of_samples_compile_anew(tiny_model, randn, relative_error):
    eager = tiny_model()
    compiled = copy.deepcopy(eager)
    counter = CompileCounter()
    compiled.compile_repeated_blocks(backend=counter)
    draw = randn(0)
    a, b, c, d = ((3, 4, 6), 5), ((1, 4, 4), (2, 4, 4), 7), ((2, 6, 6), 3), ((1, 4, 8), 4)
    packs = [_pack(eager, draw, *samples) for samples in ([a], [b], [c], [a, b], [b, c, d], [d, c, b, a], [a, d])]
    frames = []
    for packed in packs:
        with torch.no_grad():
            assert relative_error(compiled(packed), eager(packed)) < 1e-6
        frames.append(counter.frame_count)
    # Once for the first size, once for any size; the same again when a pack first holds several samples.
    assert frames[0] == 1 and frames[1] == frames[2] == 2
    assert frames[3] > frames[2] and frames[4] == frames[5] == frames[6]

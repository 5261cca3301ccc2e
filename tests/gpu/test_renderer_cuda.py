import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bernini.attention import Lengths, packed_attention, resolve_backend
from bernini.renderer.experts import Architecture
from bernini.renderer.packing import PackedSample, Segment, pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
BF16_ERROR = 2e-2  # relative L2; a rounding to bf16 is 1e-3, and a few add up


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    with CUDA:
        model = Architecture(
            num_layers=2, num_attention_heads=2, attention_head_dim=128, ffn_dim=512, text_dim=64, in_channels=4
        ).build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.to(torch.bfloat16)


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator(CUDA).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=CUDA)

    return [
        PackedSample([Segment(draw(4, 5, 16, 24), 1), Segment(draw(4, 5, 16, 24), 0)], draw(40, 64), 700.0),
        PackedSample([Segment(draw(4, 1, 32, 16), 0)], draw(512, 64), 30.0),
        PackedSample([Segment(draw(4, 1, 8, 8), 1), Segment(draw(4, 3, 12, 8), 0)], draw(77, 64), 450.0),
    ]


KERNELS = {
    "cudnn": "aten::_scaled_dot_product_cudnn_attention",
    "varlen": "aten::_flash_attention",
}
FORWARD = {"varlen": "aten::_flash_attention_forward"}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("pairs", [None, ((700, 512), (700, 512), (68, 77))], ids=["one", "several"])
def test_attention_is_of_its_backend_and_right(pairs, backend, relative_error):
    lengths = Lengths.of(pairs, CUDA) if pairs else None
    queries, keys = (1468, 1101)
    q, k, v = (
        torch.randn(n, 12, 128, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for n in (queries, keys, keys)
    )
    probe = torch.randn_like(q)
    assert resolve_backend("auto", CUDA, q.dtype, 128) == "cudnn"
    with profile(activities=[ProfilerActivity.CPU]) as operators:  # it sees into operators of our own
        out = packed_attention(q, k, v, lengths, backend)
        grads = torch.autograd.grad(out, (q, k, v), probe)
    if backend == "cudnn" or lengths:
        assert {FORWARD.get(backend, KERNELS[backend]), f"{KERNELS[backend]}_backward"} <= {
            event.key for event in operators.key_averages()
        }
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    reference = packed_attention(*exact, lengths, "math")
    for got, wanted in zip(
        (out, *grads), (reference, *torch.autograd.grad(reference, exact, probe.float())), strict=True
    ):
        assert relative_error(got.float(), wanted) < BF16_ERROR


def test_packed_samples_are_the_same_as_alone(model, samples, relative_error):
    with torch.no_grad():
        together = model(pack(samples, model.patch)).float()
        alone = torch.cat([model(pack([s], model.patch)) for s in samples]).float()
    assert relative_error(together, alone) < BF16_ERROR
    start = 0
    for sample in samples:  # each for itself: a small sample's error must not hide behind a large one's size
        end = start + pack([sample], model.patch).tokens
        assert relative_error(together[start:end], alone[start:end]) < BF16_ERROR
        start = end


def test_compiled_blocks_compute_what_eager_ones_do(model, samples, relative_error):
    packed = pack(samples[:1], model.patch)
    compiled = copy.deepcopy(model)
    compiled.compile_repeated_blocks(fullgraph=True)
    gradients = []
    for one in (model, compiled):
        one.enable_gradient_checkpointing()
        one.zero_grad()
        one(packed).float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in one.parameters()]).float())
        one.zero_grad()
    assert relative_error(gradients[1], gradients[0]) < BF16_ERROR
    with torch.no_grad():
        assert relative_error(compiled(packed).float(), model(packed).float()) < BF16_ERROR


def test_saving_outputs_gives_the_same(model, samples, relative_error):
    packed, other = pack(samples, model.patch), copy.deepcopy(model)
    other.rope_saves = "outputs"
    outputs, gradients = [], []
    for one in (model, other):
        one.zero_grad()
        outputs.append(one(packed).float())
        outputs[-1].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in one.parameters()]).float())
        one.zero_grad()
    assert relative_error(outputs[1], outputs[0]) < BF16_ERROR
    assert relative_error(gradients[1], gradients[0]) < BF16_ERROR


@pytest.mark.parametrize("several", [False, True])
def test_a_forward_never_waits_for_the_device(model, samples, several):
    packed = pack(samples if several else samples[:1], model.patch)
    model.enable_gradient_checkpointing()
    model(packed)  # loading libraries and choosing kernels may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = model(packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()

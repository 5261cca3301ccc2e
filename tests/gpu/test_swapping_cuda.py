import copy

import pytest
import torch

from bernini.lora import add_lora, trainable
from bernini.quantizing import QuantizedLinear, quantize
from bernini.renderer.experts import Architecture
from bernini.renderer.lora import LoRAConfig
from bernini.renderer.packing import PackedSample, Segment, pack
from bernini.swapping import BlockSwapping, HostWeights, bring_for_calls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
LAYERS, WIDTH = 8, 1024
BF16_ERROR = 2e-2  # relative L2


def make_model(kind=None):
    """Eight blocks of 29 MB in bfloat16, with a LoRA that does something, recomputed."""
    torch.manual_seed(0)
    with CUDA:
        model = Architecture(
            num_layers=LAYERS, num_attention_heads=8, attention_head_dim=128, ffn_dim=3072, text_dim=64, in_channels=4
        ).build()
        model.to(torch.bfloat16)
        add_lora(model, LoRAConfig(rank=4))
    for parameter in trainable(model):
        parameter.data = torch.randn_like(parameter) / 50
    if kind:
        quantize(model.blocks, kind)
    model.enable_gradient_checkpointing()
    return model


@pytest.fixture(scope="module")
def packed():
    generator = torch.Generator(CUDA).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=CUDA)

    samples = [PackedSample([Segment(draw(4, 9, 32, 32), 1), Segment(draw(4, 9, 32, 32), 0)], draw(64, 64), 700.0)]
    return pack(samples, (1, 2, 2))


def gradients(model, packed):
    """All gradients of a step under autocast, laid end to end."""
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(packed).float().square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in trainable(model)])


def block_bytes(model):
    return sum(t.nbytes for t in model.blocks[0].parameters() if not t.requires_grad)


def peak(model, packed):
    """Bytes allocated at the worst moment of a step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    gradients(model, packed)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("count", [3, LAYERS])
def test_swapped_blocks_learn_the_same_and_free_their_memory(packed, relative_error, kind, count):
    model = make_model(kind)
    size = block_bytes(model)
    expected = gradients(model, packed)
    noise = relative_error(gradients(model, packed), expected)  # kernels that add up in any order
    before = peak(model, packed)
    model.zero_grad()
    swapping = BlockSwapping(model, count)
    for _ in range(4):  # a copy that came too late, or into memory in use, would show in one of them
        assert relative_error(gradients(model, packed), expected) <= max(4 * noise, 1e-3)
    assert before - peak(model, packed) >= (count - 2.2) * size  # the allocator rounds a little
    assert len(swapping.loaded) <= 2
    assert all(weights._host.is_pinned() for weights in swapping._weights)


def test_a_step_never_waits_for_the_device(packed):
    model = make_model()
    BlockSwapping(model, LAYERS)
    gradients(model, packed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(model, packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_compiled_swapped_blocks_learn_the_same(packed, relative_error, kind):
    model = make_model(kind)
    expected = gradients(model, packed)
    BlockSwapping(model, LAYERS - 1)
    model.compile_repeated_blocks()
    for _ in range(2):
        assert relative_error(gradients(model, packed), expected) < BF16_ERROR


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bits_learn_what_the_dequantised_weights_do_in_half_the_memory(packed, relative_error, kind):
    quantized = make_model(kind)
    plain = copy.deepcopy(quantized)
    for layer in [layer for layer in plain.modules() if isinstance(layer, QuantizedLinear)]:
        layer.weight = torch.nn.Parameter(layer.dequantized(), requires_grad=False)
        del layer.scale
        layer.__class__ = torch.nn.Linear
    assert block_bytes(quantized) < 0.51 * block_bytes(plain)
    assert relative_error(gradients(quantized, packed), gradients(plain, packed)) < 1e-2


def test_host_weights_come_and_go():
    layer = torch.nn.Linear(512, 512, device=CUDA).requires_grad_(False)
    expected = layer.weight.clone()
    weights = HostWeights(layer)
    assert layer.weight.device.type == "cpu" and torch.equal(layer.weight, expected.cpu())
    stream = torch.cuda.Stream()
    for _ in range(3):
        weights.load(CUDA, stream)
        weights.wait()
        assert torch.equal(layer.weight, expected)
        weights.drop()
    layer.to(CUDA)
    assert layer.weight.device.type == "cpu"


def test_weights_that_come_for_calls_leave_no_memory_taken():
    layers = [torch.nn.Linear(1024, 1024, device=CUDA).requires_grad_(False) for _ in range(2)]
    x = torch.randn(8, 1024, device=CUDA)
    expected = [layer(x) for layer in layers]
    before = torch.cuda.memory_allocated()
    for layer in layers:
        bring_for_calls(layer, ["forward"], lambda: CUDA)
    assert before - torch.cuda.memory_allocated() >= 2 * 4 * 1024**2
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        for layer, wanted in zip(layers, expected, strict=True):
            assert torch.equal(layer(x), wanted)
    assert torch.cuda.memory_allocated() == before

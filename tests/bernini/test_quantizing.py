import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from factories import build, fit, keep_checkpoints, make_config
from test_swapping import make_model, make_pack, settings, steps
from torch import nn

from bernini.checkpoints.lora import read_lora
from bernini.errors import ConfigError
from bernini.lora import trainable
from bernini.quantizing import QuantizedLinear, dequantize, quantize, quantize_tensor
from bernini.renderer.lora import FILES, save_lora


def make_weight(randn: Any, dtype: torch.dtype) -> torch.Tensor:
    weight = randn(0)(64, 256) * torch.logspace(-6, 3, 64)[:, None]
    weight[5] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_as_close_as_they_say(randn: Any, dtype: torch.dtype) -> None:
    weight = make_weight(randn, dtype)
    largest = weight.abs().amax(dim=1, keepdim=True).float()
    rounding = torch.finfo(dtype).eps * weight.abs().float()  # of the scale, and of the product
    for kind in ("int8", "fp8"):
        values, scale = quantize_tensor(weight, kind)
        assert values.element_size() == 1 and scale.dtype == dtype
        off = (dequantize(values, scale, dtype).float() - weight.float()).abs()
        step = largest / 127 / 2 if kind == "int8" else (weight.abs().float() / 16).maximum(largest / 448 / 1024)
        assert (off <= 1.01 * step + rounding).all()
        assert off[6:].norm() / weight[6:].float().norm() < {"int8": 0.012, "fp8": 0.03}[kind]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("autocast", [False, True])
def test_layer_computes_what_one_with_the_dequantised_weights_does(randn: Any, kind: Any, autocast: bool) -> None:
    layer = nn.Linear(32, 48).requires_grad_(False)
    quantize(layer, kind)
    x = randn(1)(7, 32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = layer(x), F.linear(x, layer.dequantized(), layer.bias)
        assert found.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(found, expected)
    probe = torch.randn_like(found)
    gradients = [torch.autograd.grad(out, x, probe)[0] for out in (found, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_lora_learns_what_it_does_over_the_dequantised_weights(randn: Any, kind: Any) -> None:
    packed, quantized = make_pack(randn), make_model(kind)
    plain = copy.deepcopy(quantized)
    layers = [layer for layer in plain.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == 5 * 10 and all(layer.weight.element_size() == 1 for layer in layers)
    for layer in layers:
        layer.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
        del layer.scale
        layer.__class__ = nn.Linear
    for one, other in zip(steps(plain, packed, 1), steps(quantized, packed, 1), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-8)


def test_backward_keeps_nothing_but_the_eight_bits() -> None:
    layer = nn.Linear(32, 48, bias=False).requires_grad_(False)
    quantize(layer, "int8")
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(torch.randn(7, 32, requires_grad=True))
    assert {x.data_ptr() for x in kept} == {layer.weight.data_ptr(), layer.scale.data_ptr()}


def test_lora_keeps_its_input_once_under_autocast() -> None:
    block = make_model("int8", 1).blocks[0].attn1
    x = torch.randn(7, 32, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        for layer in (block.to_q, block.to_k, block.to_v):
            assert layer(x).dtype == torch.bfloat16
    assert {t.data_ptr() for t in kept if t.numel() == x.numel()} == {x.data_ptr()}


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="int8, fp8"):
        quantize(nn.Linear(2, 2), "int4")  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "ranks"), [("int8", 1), ("fp8", 2)])
def test_run_over_eight_bits_keeps_and_writes_the_lora_alone(
    wan: Path, shards: Path, tmp_path: Path, kind: str, ranks: int
) -> None:
    """Two ranks: DDP must not send weights whose dtype gloo does not know."""
    config = make_config(wan, shards, tmp_path, **settings(quantize=kind, swap_blocks=1, frozen_dtype="bfloat16"))
    config["trainer"] |= {"precision": "bf16-mixed", "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
    keep_checkpoints(config, tmp_path)
    fit(config, ranks=ranks)
    config["trainer"] |= {"devices": 1, "strategy": "auto"}
    module = build(config, tmp_path)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    module.load_state_dict(stored, strict=False)
    save_lora(module.renderer, tmp_path / "lora")
    written = read_lora(tmp_path / "lora" / FILES["transformer"])
    learned = sum(p.numel() for p in trainable(module))
    assert sum(layer.down.numel() + layer.up.numel() for layer in written.layers.values()) == learned

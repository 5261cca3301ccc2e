"""Frozen linear layers whose weights are kept in eight bits and computed with in the dtype of what they are given."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bernini.errors import ConfigError

Quantization = Literal["int8", "fp8"]
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def quantize_tensor(weight: Tensor, kind: Quantization) -> tuple[Tensor, Tensor]:
    """Weights in eight bits, symmetric, with a scale for each output channel.

    Args:
        weight: ``[out, in]``.
        kind: ``int8``, off by half a step of ``max / 127`` at most, or ``fp8`` (e4m3), off by ``1 / 16`` of each value
            (``max / 448 / 1024`` where that is more).

    Returns:
        ``[out, in]`` in eight bits, and ``[out, 1]`` scales in the dtype of the weights.
    """
    dtype = DTYPES[kind]
    largest = 127.0 if kind == "int8" else torch.finfo(dtype).max
    scale = (weight.abs().amax(dim=1, keepdim=True).float() / largest).clamp(min=1e-12).to(weight.dtype)
    values = (weight.float() / scale.float()).clamp(-largest, largest)
    return (values.round() if kind == "int8" else values).to(dtype), scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights ``[out, in]`` that eight bits and scales stand for."""
    return (weight.to(scale.dtype) * scale).to(dtype)


class _Linear(torch.autograd.Function):
    """A linear map that keeps its weights' eight bits for the backward pass, and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, dequantize(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ dequantize(weight, scale, gradient.dtype), None, None, None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with weights in eight bits, computing what a layer with the dequantised ones would."""

    scale: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """The layer of ``[..., in]``, in the dtype of ``x`` or of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Linear.apply(x, self.weight, self.scale, self.bias)

    def dequantized(self) -> Tensor:
        """The weights ``[out, in]``, in the dtype that they had."""
        return dequantize(self.weight, self.scale, self.scale.dtype)


@torch.no_grad()
def quantize(module: nn.Module, kind: Quantization) -> None:
    """Bring the weights of all frozen linear layers of a module to eight bits, in place.

    Args:
        module: The module; layers with trained weights, such as those of a LoRA, stay as they are.
        kind: Which eight bits.

    Raises:
        ConfigError: There is no such kind.
    """
    if kind not in get_args(Quantization):
        raise ConfigError(f"unknown quantization {kind!r}", fix=f"one of {', '.join(get_args(Quantization))}")
    for layer in module.modules():
        if type(layer) is nn.Linear and not layer.weight.requires_grad:
            weight, scale = quantize_tensor(layer.weight, kind)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.scale = nn.Parameter(scale, requires_grad=False)
            layer.__class__ = QuantizedLinear  # same name, so that a LoRA's updates keep theirs

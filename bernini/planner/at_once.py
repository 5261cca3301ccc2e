"""Sums of large parts whose gradients are made on the way, so that the memory of one part serves them all."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bernini.errors import ConfigError

Part = TypeVar("Part")


def sum_at_once(
    share: Callable[[Tensor, Part], Tensor], parts: Sequence[Part], x: Tensor, weights: Iterable[Tensor]
) -> Tensor:
    """Sum of ``share(x, part)`` over the parts; if there are several, each is differentiated before the next begins.

    Nothing of a part is kept for the backward pass but gradients, and nothing is recomputed. The gradients are those of
    the sum of what is returned: the backward pass scales them by the weight that each element has in a sum or a mean.

    Args:
        share: Makes ``[n]`` of ``x`` and a part.
        parts: At least one.
        x: What the parts share and what may have a history.
        weights: Leaves that ``share`` uses.

    Returns:
        ``[n]``.

    Raises:
        ConfigError: In the backward pass, if elements weigh differently.
    """
    trained = [weight for weight in weights if weight.requires_grad]
    if len(parts) == 1 or not (torch.is_grad_enabled() and (trained or x.requires_grad)):
        return torch.stack([share(x, part) for part in parts]).sum(0)
    return cast(Tensor, _AtOnce.apply(share, parts, x, *trained))


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, share: Callable[[Tensor, Any], Tensor], parts: Sequence[Any], x: Tensor, *w: Tensor
    ) -> Tensor:
        own = x.detach().float().requires_grad_(x.requires_grad)  # its gradients add up in fp32
        inputs = [tensor for tensor in (own, *w) if tensor.requires_grad]
        gradients, values = [torch.zeros_like(tensor) for tensor in inputs], []
        for part in parts:
            with torch.enable_grad():
                value = share(own, part)
            with torch.autocast(x.device.type, enabled=False):  # as backward passes are run
                for total, more in zip(
                    gradients, torch.autograd.grad(value, inputs, torch.ones_like(value)), strict=True
                ):
                    total += more
            values.append(value.detach())
        ctx.gradients = gradients
        return torch.stack(values).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.equal(upstream, upstream[:1].expand_as(upstream)):
            raise ConfigError(
                "tokens of a chunked loss have different weights in the backward pass",
                why="its gradients were made in the forward pass, for one weight of all",
                fix="take the sum or the mean of the loss, or set the flow head's chunk to null",
            )
        gradients, ctx.gradients = iter(ctx.gradients), None
        return tuple(next(gradients).mul_(upstream[0]) if needed else None for needed in ctx.needs_input_grad)

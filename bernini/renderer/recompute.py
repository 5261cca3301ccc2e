"""What a block keeps for the backward pass, and what is computed again or comes back from the host."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import bernini.grouped  # noqa: F401  registers bernini::attend

Recompute = Literal["none", "pointwise", "attention", "full", "offload"]
"""``none``: all is kept. ``pointwise``: what matrix products and attention give is kept, the rest computed again.
``attention``: what attention gives is kept. ``full``: a block's input is kept. ``offload``: that, on the host."""

aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1, aten._scaled_mm.default: 0}  # which argument comes first
ATTENTION = {
    torch.ops.bernini.attend.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
# A product whose rows are so many times wider than the factors', as a LoRA's second one, is redone in the time that it
# takes to read it.
NARROW = 8


def keep_attention(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Policy of selective checkpointing under ``attention``."""
    return CheckpointPolicy.MUST_SAVE if op in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Policy of selective checkpointing under ``pointwise``."""
    if op not in PRODUCTS:
        return keep_attention(context, op)
    first, second = args[PRODUCTS[op] :][:2]
    kept = NARROW * first.shape[-1] >= second.shape[-1]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recomputing(recompute: Recompute, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call a function within a block that recomputes a part of itself; the compiler's partitioner heeds that, too."""
    if recompute not in ("pointwise", "attention"):
        return function(*args)
    policy = keep_products if recompute == "pointwise" else keep_attention
    context = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *args, use_reentrant=False, context_fn=context)


def caller(recompute: Recompute, device: torch.device) -> Callable[..., Tensor]:
    """What calls blocks one after another in a forward pass: ``call(block, x, *args)``."""
    if recompute == "offload":
        return Offload(device)
    if recompute == "full":
        return partial(checkpoint, use_reentrant=False)
    return lambda block, *args: block(*args)  # a part of a block is recomputed by itself


class Offload:
    """Calls blocks and sends their inputs to pinned memory, from where each is fetched ahead of its backward pass.

    Copies have a stream of their own, and blocks are computed meanwhile. One serves one forward pass.

    Args:
        device: Where the blocks are.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        self._away: list[Tensor] = []
        self._back: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}

    def __call__(self, block: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
        """``block(x, *args)``, of which nothing but ``args`` stays on the device."""
        place = x.data_ptr()

        def send(tensor: Tensor) -> Tensor | int:
            is_input = tensor.data_ptr() == place and tensor.shape == x.shape
            return self._send(tensor) if is_input else tensor

        with saved_tensors_hooks(send, self._receive):
            return checkpoint(block, x, *args, use_reentrant=False)

    def _send(self, x: Tensor) -> int:
        host = torch.empty_like(x, device="cpu", pin_memory=self._stream is not None)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            x.record_stream(self._stream)
        with self._aside():
            host.copy_(x, non_blocking=True)
        self._away.append(host)
        return len(self._away) - 1

    def _fetch(self, number: int) -> None:
        if number < 0 or number in self._back:
            return
        with self._aside():
            x = self._away[number].to(self._device, non_blocking=True)
            self._back[number] = x, self._stream.record_event() if self._stream is not None else None

    def _receive(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._fetch(packed)
        x, event = self._back.pop(packed)
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
            x.record_stream(torch.cuda.current_stream())
        self._fetch(packed - 1)  # which the backward pass wants next, while this one is computed
        return x

    def _aside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

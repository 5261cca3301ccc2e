"""A rotary kernel in Triton that reads a table: the rival that norms and rotates in two passes over memory."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # heads of a program


@triton.jit
def _rotate(
    out, x, cos, sin, stride_token, heads, HALF: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr
):  # fmt: skip
    token, first = tl.program_id(0), tl.program_id(1) * ROWS
    head = first + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, 2 * HALF)[None, :]
    pair = tl.arange(0, HALF)[None, :]
    known = head < heads
    rows = tl.load(x + token * stride_token + head * (2 * HALF) + lane, mask=known, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(rows, (ROWS, HALF, 2)))
    c, s = tl.load(cos + token * HALF + pair), tl.load(sin + token * HALF + pair)
    if BACK:
        s = -s
    turned = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (ROWS, 2 * HALF))
    tl.store(out + (token * heads + head) * (2 * HALF) + lane, turned.to(out.dtype.element_ty), mask=known)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    x = x.contiguous()
    tokens, heads, head_dim = x.shape
    out = torch.empty_like(x)
    grid = tokens, triton.cdiv(heads, ROWS)
    _rotate[grid](out, x, cos, sin, x.stride(0), heads, HALF=head_dim // 2, ROWS=ROWS, BACK=back)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _launch(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _launch(grad, cos, sin, back=True), None, None


def triton_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of ``x [tokens, heads, head_dim]`` by tables ``[tokens, head_dim / 2]`` in float32."""
    return _Rotary.apply(x, cos, sin)

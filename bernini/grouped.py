"""Attention of a pack of several samples as one operator, which compilers do not look into and recomputation can keep.

Kernels are torch's own, forward and backward, called once for each run of neighbouring samples of equal lengths.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
LSE_ROWS = 32  # torch's efficient kernel pads its logarithms to a multiple of it


class Kernel(NamedTuple):
    """One backend.

    Attributes:
        forward: ``(q, k, v, bias)``, ``[samples, heads, n, head_dim]`` and ``[samples, heads or 1, n, keys]`` or null,
            to the output and the logarithm of each row's sum of exponentials, ``[samples, heads, n]``.
        backward: ``(grad, q, k, v, out, lse, bias)`` to the gradients of q, k and v.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _no_dropout(like: Tensor) -> tuple[Tensor, Tensor]:
    """The state of dropout that backward kernels take and, without dropout, do not read."""
    return torch.zeros(2, dtype=torch.uint64, device=like.device), torch.empty(
        0, dtype=torch.uint64, device=like.device
    )


def _cudnn(q: Tensor, k: Tensor, v: Tensor, bias: None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True)
    return out, lse.reshape(q.shape[:3])


def _cudnn_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: None) -> Any:
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse[..., None], seed, seed, bias, None, None, q.shape[2], k.shape[2], 0.0, False
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
    return out, lse


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: None) -> Any:
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, *_no_dropout(q)
    )


def _aligned(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """The bias for every head and row, its rows a multiple of 8 apart, as the efficient kernel wants it."""
    if bias is None:
        return None
    keys = bias.shape[-1]
    return F.pad(bias, (0, -keys % 8))[..., :keys].expand(-1, q.shape[1], q.shape[2], -1)


def _efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, _aligned(bias, q), True)
    return out, lse[..., : q.shape[2]]


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None
) -> Any:
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    lse = F.pad(lse, (0, -lse.shape[-1] % LSE_ROWS), value=torch.inf)
    wanted = [True, True, True, False]
    grads = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, _aligned(bias, q), out, lse, seed, seed, 0.0, wanted
    )
    return grads[:3]


def _cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)


def _cpu_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None) -> Any:
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)  # the kernel reads it in this layout
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, attn_mask=bias
    )


def _scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores if bias is None else scores + bias


def _math(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = _scores(q.to(exact), k.to(exact), bias)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.to(exact)).to(q.dtype), lse


def _math_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None) -> Any:
    dtype, exact = q.dtype, lse.dtype
    grad, q, k, v, out = (x.to(exact) for x in (grad, q, k, v, out))
    shares = (_scores(q, k, bias) - lse[..., None]).exp()
    ds = shares * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    return tuple(x.to(dtype) for x in (ds @ k, ds.mT @ q, shares.mT @ grad))


KERNELS = {
    "cudnn": Kernel(_cudnn, _cudnn_backward),
    "flash": Kernel(_flash, _flash_backward),
    "efficient": Kernel(_efficient, _efficient_backward),
    "cpu": Kernel(_cpu, _cpu_backward),
    "math": Kernel(_math, _math_backward),
}


def _kernel(backend: str, q: Tensor) -> Kernel:
    """The kernels of a resolved backend; ``native`` is what takes a bias and any dtype on the device."""
    if backend == "native":
        aligned = q.shape[-1] % 8 == 0 and q.dtype != torch.float64
        backend = "cpu" if q.device.type == "cpu" else "efficient" if q.device.type == "cuda" and aligned else "math"
    return KERNELS[backend]


def _runs(lengths: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Neighbouring samples of equal lengths: how many, where their queries are, where their keys."""
    q_start = k_start = 0
    for (queries, keys), own in groupby(map(tuple, lengths.tolist())):
        samples = len(list(own))
        q_end, k_end = q_start + samples * queries, k_start + samples * keys
        yield samples, slice(q_start, q_end), slice(k_start, k_end)
        q_start, k_start = q_end, k_end


def _split(x: Tensor, samples: int) -> Tensor:
    """``[samples * n, heads, head_dim]`` to ``[samples, heads, n, head_dim]``."""
    return x.unflatten(0, (samples, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def _join(parts: list[Tensor], dim: int = 0) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim)).contiguous()


def _bias(seen: Tensor | None, keys: slice, samples: int, q: Tensor) -> Tensor | None:
    """``[samples, 1, 1, keys]``: 0 for keys that are attended, else minus infinity."""
    if seen is None:
        return None
    bias = torch.zeros(seen[keys].shape, dtype=q.dtype, device=q.device).masked_fill_(~seen[keys], -torch.inf)
    return bias.view(samples, 1, 1, -1)


@torch.library.custom_op("bernini::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    seen: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Full attention within each sample.

    Args:
        q: ``[q_tokens, heads, head_dim]``, samples one after another.
        k: ``[k_tokens, heads, head_dim]``.
        v: As ``k``.
        lengths: ``[samples, 2]`` int64 on the CPU, queries and keys of each sample.
        q_starts: ``[samples + 1]`` int32, where the queries of each sample start, and the end; on the queries' device.
        k_starts: The same of the keys.
        seen: Bool ``[k_tokens]``, keys that are attended; all if null.
        backend: A key of `KERNELS`, ``native`` or ``varlen``.

    Returns:
        ``[q_tokens, heads, head_dim]``, and the logarithms of the rows' sums of exponentials ``[heads, q_tokens]``.
    """
    if backend == "varlen":
        longest = lengths.amax(0).tolist()
        out, lse, *_ = aten._flash_attention_forward(q, k, v, q_starts, k_starts, *longest, 0.0, False, False)
        return out.contiguous(), lse.contiguous()
    kernel, outs, lses = _kernel(backend, q), [], []
    with torch.autocast(q.device.type, enabled=False):
        for samples, queries, keys in _runs(lengths):
            parts = (_split(q[queries], samples), _split(k[keys], samples), _split(v[keys], samples))
            out, lse = kernel.forward(*parts, _bias(seen, keys, samples, q))
            outs.append(_merge(out))
            lses.append(lse.transpose(0, 1).flatten(1))
    return _join(outs), _join(lses, 1)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=exact)


@torch.library.custom_op("bernini::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    seen: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, keys and values of `attend`."""
    if backend == "varlen":
        longest = lengths.amax(0).tolist()
        grads = aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, q_starts, k_starts, *longest, 0.0, False, *_no_dropout(q)
        )
        dq, dk, dv = (x.contiguous() for x in grads)
        return dq, dk, dv
    kernel, found = _kernel(backend, q), []
    grad = grad.contiguous()  # cuDNN wants it laid out as the output
    with torch.autocast(q.device.type, enabled=False):
        for samples, queries, keys in _runs(lengths):
            rows = [_split(x, samples) for x in (grad[queries], q[queries], k[keys], v[keys], out[queries])]
            own = lse[:, queries].unflatten(1, (samples, -1)).transpose(0, 1).contiguous()
            grads = kernel.backward(*rows, own, _bias(seen, keys, samples, q))
            found.append([_merge(x) for x in grads])
    dq, dk, dv = (_join(list(parts)) for parts in zip(*found, strict=True))
    return dq, dk, dv


@_attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, *told, out, lse = ctx.saved_tensors
    grads = torch.ops.bernini.attend_backward(grad, q, k, v, out, lse, *told, ctx.backend)
    return *grads, None, None, None, None, None


torch.library.register_autograd("bernini::attend", _differentiate, setup_context=_save)

"""The one call in which the DiT normalises and rotates queries and keys, and the kernels behind it."""

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton

from bernini.errors import ConfigError, DataError
from bernini.rope.build import load_library
from bernini.rope.reference import THETA, axis_dims, rotate, sa3d_angles

Kernel = Literal["fused", "compiled", "reference"]
"""``fused``: one pass over memory, in CUDA. ``compiled``: the reference as one compiled graph."""

Saves = Literal["inputs", "outputs"]
"""What the fused kernel's backward starts from."""

VARIABLE = "BERNINI_ROPE"
COLUMNS = ("token_start", "T", "H", "W", "source id")
FUSED_HEADS = (16, 32, 64, 128)
FUSED_WIDTH = 8192
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Segments:
    """What the rotation needs to know of a pack.

    Attributes:
        table: ``[n, 5]`` float32 rows (token_start, T, H, W, source id), all that the fused kernel reads.
        tokens: Number of tokens that are rotated.
        offset: Number of the first one, of a rank that holds a slice of the pack.
        kernel: What rotates.
        constants: What the kernel reads besides: `fused_frequencies`, or cosines and sines ``[tokens, head_dim / 2]``
            in float32, made once per pack for all layers.
    """

    table: Tensor
    tokens: int
    offset: int
    kernel: Kernel
    constants: tuple[Tensor, ...]


def prepare_segments(
    table: Tensor,
    tokens: int,
    head_dim: int,
    offset: int = 0,
    kernel: Kernel | None = None,
    checked: bool = False,
) -> Segments:
    """Do once per pack what all layers share.

    Angles are float64 until their cosine is taken: float32 radians of positions near 1024 are off by 6e-5.

    Args:
        table: ``[n, 5]`` rows (token_start, T, H, W, source id).
        tokens: Number of tokens to be rotated: those of the pack, or of a rank's slice of it.
        head_dim: Dimensions of a head.
        offset: Number of the slice's first token in the pack.
        kernel: What rotates; the best there is if null.
        checked: The table is known to be right, as that of a pack is. Any other is read, for which the host waits for
            the device once.

    Raises:
        DataError: The rows are not segments one after another that cover the tokens, or an id is negative.
        ConfigError: The kernel cannot run here.
    """
    if not checked:
        check_table(table, tokens, offset)
    kernel = kernel or choose_kernel(table.device, head_dim)
    if kernel == "fused":
        return Segments(table.float(), tokens, offset, kernel, (fused_frequencies(head_dim, table.device),))
    angles = sa3d_angles(table, tokens, head_dim, offset)
    return Segments(table, tokens, offset, kernel, (angles.cos().float(), angles.sin().float()))


def check_table(table: Tensor, tokens: int, offset: int = 0) -> None:
    """Look at every row of a segment table.

    Args:
        table: ``[n, 5]`` rows (token_start, T, H, W, source id).
        tokens: Number of tokens to be rotated.
        offset: Number of the first one.

    Raises:
        DataError: The rows are not segments one after another that cover the tokens, or an id is negative.
    """
    if table.ndim != 2 or table.shape[1] != 5 or not len(table):
        raise DataError(f"a segment table of shape {list(table.shape)}", why=f"its rows are ({', '.join(COLUMNS)})")
    end = 0.0
    for number, row in enumerate(table.tolist()):
        start, t, h, w, source_id = row
        told = f"row {number}: " + ", ".join(f"{name} {value:g}" for name, value in zip(COLUMNS, row, strict=True))
        if start != end or not all(size >= 1 and size % 1 == 0 for size in (t, h, w)):
            why = f"segments lie one after another, this one from token {end:g} on, and have whole grids"
            raise DataError("a segment that is none", where=told, why=why)
        if not 0 <= source_id < math.inf:
            raise DataError("a source id below 0 or not finite", where=told)
        end = start + t * h * w
    if not 0 <= offset <= offset + tokens <= end:
        raise DataError(
            "segments do not cover the tokens",
            why=f"tokens {offset} to {offset + tokens} are to be rotated, and the rows hold {end:g}",
        )


def choose_kernel(device: torch.device, head_dim: int) -> Kernel:
    """The kernel that rotates on a device: the environment's ``BERNINI_ROPE``, or else the fastest that runs.

    Raises:
        ConfigError: The environment's choice is unknown or cannot run here.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in ("auto", *get_args(Kernel)):
        kernels = ", ".join(get_args(Kernel))
        raise ConfigError(f"unknown kernel {asked!r}", where=VARIABLE, fix=f"unset it, or use one of {kernels}")
    if asked in ("compiled", "reference"):
        return cast(Kernel, asked)
    reason = why_not_fused(device, head_dim)
    if not reason:
        return "fused"
    if asked == "fused":
        raise ConfigError("the fused SA-3D RoPE op cannot run here", where=VARIABLE, why=reason, fix="unset it")
    return "compiled" if device.type == "cuda" and has_triton() else "reference"


def why_not_fused(device: torch.device, head_dim: int) -> str:
    """What keeps the fused kernel from running, which may take a build to find out; empty if nothing does."""
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}"
    if head_dim not in FUSED_HEADS:
        return f"heads have {head_dim} dimensions, and it knows {', '.join(map(str, FUSED_HEADS))}"
    return load_library()


def full_width_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over all heads at once, in fp32 inside.

    Args:
        x: ``[tokens, dim]``.
        weight: ``[dim]``, fp32 or in the dtype of ``x``; torch fuses the norm only where both are of one dtype.
        eps: Added to the mean square.

    Returns:
        ``[tokens, dim]`` in the dtype of ``x``.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x.to(weight.dtype), x.shape[-1:], weight, eps).to(x.dtype)


def sa3d_qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    segments: Segments,
    eps: float,
    save_outputs: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the full width, then SA-3D RoPE, for queries and keys.

    What is normalised is rounded to the input's dtype before it is rotated, as in Wan; the fused kernel rounds once, at
    the end.

    Args:
        q: ``[tokens, heads, head_dim]``; a view of a wider projection will do. The fused kernel copies rows that do not
            begin at a multiple of 16 bytes.
        k: As ``q``.
        weight_q: ``[heads * head_dim]``, fp32 or in the dtype of ``q``; null rotates alone.
        weight_k: As ``weight_q``.
        segments: The pack's segments.
        eps: Added to the mean square.
        save_outputs: Have the fused kernel's backward start from the outputs, which attention keeps anyway, instead of
            the inputs: 4 bytes a token and side are then all that it saves. Where a weight is zero, its gradient is.

    Returns:
        The rotated ``q`` and ``k``, shape and dtype as given.

    Raises:
        DataError: ``q``, ``k``, weights and segments do not fit each other.
        ConfigError: The fused kernel does not know their dtype or width.
    """
    if not torch.compiler.is_compiling():  # compilers would specialise on the number of tokens
        _check(q, k, (weight_q, weight_k), segments)
    if segments.kernel == "fused":
        _check_fused(q, (weight_q, weight_k))
        (frequencies,) = segments.constants
        out_q, out_k, _ = torch.ops.bernini.sa3d_qk_norm_rope(
            q,
            k,
            weight_q,
            weight_k,
            segments.table,
            frequencies,
            eps,
            segments.offset,
            False,
            save_outputs,
        )
        return out_q, out_k
    one = _compiled if segments.kernel == "compiled" else _normed_and_rotated
    cos, sin = segments.constants
    return one(q, weight_q, cos, sin, eps), one(k, weight_k, cos, sin, eps)


def _check(q: Tensor, k: Tensor, weights: tuple[Tensor | None, Tensor | None], segments: Segments) -> None:
    """Refuse what does not fit; nothing is asked of the device."""
    constants = segments.constants[0]  # on the table's device; compilers would specialise on the table's length
    angles = constants.shape[0 if segments.kernel == "fused" else 1]
    shape = (segments.tokens, q.shape[1] if q.ndim == 3 else 1, 2 * angles)
    for name, x in (("queries", q), ("keys", k)):
        if x.shape != shape or x.dtype != q.dtype or x.device != constants.device:
            raise DataError(
                f"{name} of {x.dtype} {list(x.shape)} on {x.device} do not fit the segments or the queries",
                why=f"rows are {q.dtype} {list(shape)} on {constants.device}",
            )
    if (weights[0] is None) != (weights[1] is None):
        raise DataError("queries and keys have a norm both or neither")
    for weight in weights:
        if weight is not None and (weight.shape != (shape[1] * shape[2],) or weight.device != q.device):
            raise DataError(
                f"norm weights of {list(weight.shape)} on {weight.device}",
                why=f"rows are {shape[1] * shape[2]} wide and on {q.device}",
            )


def _normed_and_rotated(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    normed = x if weight is None else full_width_norm(x.flatten(1), weight, eps).view_as(x)
    with torch.autocast(x.device.type, enabled=False):
        return rotate(normed, cos, sin).to(x.dtype)


_compiled = torch.compile(_normed_and_rotated, dynamic=True)


# -- the fused kernel --------------------------------------------------------------------------------------------------

torch.library.define(
    "bernini::sa3d_qk_norm_rope",
    "(Tensor q, Tensor k, Tensor? weight_q, Tensor? weight_k, Tensor segments, Tensor frequencies, float eps, "
    "int offset, bool back, bool save_outputs) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "bernini::sa3d_qk_norm_rope_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor saved_q, Tensor saved_k, Tensor weight_q, Tensor weight_k, Tensor rstd, "
    "Tensor segments, Tensor frequencies, int offset, bool outputs) -> (Tensor, Tensor, Tensor, Tensor)",
)


@lru_cache(maxsize=16)  # what comes from the host cannot be recorded in a CUDA graph
def fused_frequencies(head_dim: int, device: torch.device) -> Tensor:
    """Angles per position in half turns, ``[head_dim / 2, 4]``: of the pair's axis and of the source id.

    Each is two floats whose sum is the float64 value, so that float32 arithmetic does.
    """

    def half_turns(dim: int) -> Tensor:
        return THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim) / torch.pi

    columns = []
    for exact in (torch.cat([half_turns(dim) for dim in axis_dims(head_dim)]), half_turns(head_dim)):
        high = exact.float()
        columns += [high, (exact - high.double()).float()]
    return torch.stack(columns, dim=1).contiguous().to(device)


def _check_fused(q: Tensor, weights: tuple[Tensor | None, Tensor | None]) -> None:
    """Refuse what the fused kernel does not know."""
    width = q.shape[1] * q.shape[2]
    for weight in weights:
        if weight is not None and weight.dtype not in (torch.float32, q.dtype):
            raise DataError(f"norm weights of {weight.dtype}", why=f"rows are {q.dtype}, and weights that or float32")
    if q.dtype not in FUSED_DTYPES or width > FUSED_WIDTH:
        raise ConfigError(
            f"the fused SA-3D RoPE op does not know {q.dtype} rows of {width}",
            why=f"it knows float32, float16 and bfloat16, {FUSED_WIDTH} wide at most",
            fix=f"{VARIABLE}=compiled",
        )


@torch.library.register_fake("bernini::sa3d_qk_norm_rope")
def _fake_forward(q: Tensor, k: Tensor, weight_q: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rstd = q.new_empty((2, 0 if weight_q is None else q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), rstd


@torch.library.register_fake("bernini::sa3d_qk_norm_rope_backward")
def _fake_backward(
    grad_q: Tensor, grad_k: Tensor, saved_q: Tensor, saved_k: Tensor, weight_q: Tensor, weight_k: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        grad_q.new_empty(grad_q.shape),
        grad_k.new_empty(grad_k.shape),
        weight_q.new_empty(weight_q.shape),
        weight_k.new_empty(weight_k.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, weight_q, weight_k, segments, frequencies, ctx.eps, ctx.offset, ctx.back, ctx.outputs = inputs
    out_q, out_k, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.normed = weight_q is not None
    rows = () if not ctx.normed else (out_q, out_k) if ctx.outputs else (q, k)
    ctx.save_for_backward(segments, frequencies, rstd, weight_q, weight_k, *rows)


def _differentiate(ctx: Any, grad_q: Tensor, grad_k: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    segments, frequencies, rstd, weight_q, weight_k, *saved = ctx.saved_tensors
    weights: tuple[Tensor | None, Tensor | None] = None, None
    if ctx.normed:
        dq, dk, *weights = torch.ops.bernini.sa3d_qk_norm_rope_backward(
            grad_q, grad_k, *saved, weight_q, weight_k, rstd, segments, frequencies, ctx.offset, ctx.outputs
        )
    else:  # a rotation's gradient is turned back
        dq, dk, _ = torch.ops.bernini.sa3d_qk_norm_rope(
            grad_q, grad_k, None, None, segments, frequencies, ctx.eps, ctx.offset, not ctx.back, False
        )
    return dq, dk, *weights, None, None, None, None, None, None


torch.library.register_autograd("bernini::sa3d_qk_norm_rope", _differentiate, setup_context=_save)

"""The one call in which the DiT normalises and rotates queries and keys; faster kernels take their place behind it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bernini.rope.reference import rotate, sa3d_angles


@dataclass(frozen=True)
class Segments:
    """What the rotation needs to know of a pack.

    Attributes:
        table: ``[n, 5]`` float32 rows (token_start, T, H, W, source id), all that a fused kernel reads.
        cos: ``[tokens, head_dim / 2]`` float32, made once per pack and shared by all layers of the reference.
        sin: As ``cos``.
    """

    table: Tensor
    cos: Tensor
    sin: Tensor


def prepare_segments(table: Tensor, tokens: int, head_dim: int) -> Segments:
    """Do once per pack what all layers share.

    Angles are float64 until their cosine is taken: float32 radians of positions near 1024 are off by 6e-5.

    Args:
        table: ``[n, 5]`` rows (token_start, T, H, W, source id).
        tokens: Number of tokens in the pack.
        head_dim: Dimensions of a head.
    """
    angles = sa3d_angles(table, tokens, head_dim)
    return Segments(table, angles.cos().float(), angles.sin().float())


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
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, segments: Segments, eps: float
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the full width, then SA-3D RoPE, for queries and keys.

    The normalised value is rounded to the input's dtype before the rotation, as in Wan.

    Args:
        q: ``[tokens, heads, head_dim]``.
        k: As ``q``.
        weight_q: ``[heads * head_dim]``.
        weight_k: As ``weight_q``.
        segments: The pack's segments.
        eps: Added to the mean square.

    Returns:
        The rotated ``q`` and ``k``, shape and dtype as given.
    """

    def one(x: Tensor, weight: Tensor) -> Tensor:
        normed = full_width_norm(x.flatten(1), weight, eps).view_as(x)
        with torch.autocast(x.device.type, enabled=False):
            return rotate(normed, segments.cos, segments.sin).to(x.dtype)

    return one(q, weight_q), one(k, weight_k)

"""SA-3D RoPE in plain PyTorch: the definition that every faster implementation is held to.

Wan's 3D RoPE times one constant phase per segment (paper eq. 2). For pair ``k`` of a head of ``D`` dimensions and a
token at ``(t, h, w)`` of the segment with source id ``s``::

    angle[k] = p * theta ** (-2 j / D_axis) + s * theta ** (-2 k / D)

where the pairs are split in order over the axes t, h and w, ``p`` is the token's position on the pair's axis and ``j``
counts the pairs within the axis. The phase covers every pair. Source id 0, the target, leaves Wan's RoPE unchanged.
"""

import torch
from torch import Tensor

THETA = 10_000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Dimensions of a head given to t, h and w: h and w get ``2 * (head_dim // 6)``, t the rest."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def token_positions(segments: Tensor, tokens: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Position and source id of every token.

    Args:
        segments: ``[n, 5]`` rows (token_start, T, H, W, source id), sorted by start, the first start 0.
        tokens: Number of tokens: all that the rows cover, or a slice of them.
        offset: Number of the slice's first token.

    Returns:
        ``[tokens, 3]`` float64 positions (t, h, w) in patches, and ``[tokens]`` float64 source ids.
    """
    starts = segments[:, 0].long().contiguous()
    token = torch.arange(offset, offset + tokens, device=segments.device)
    row = torch.searchsorted(starts, token, right=True) - 1
    height, width = segments[:, 2].long()[row], segments[:, 3].long()[row]
    local = token - starts[row]
    position = torch.stack([local // (height * width), local // width % height, local % width], dim=-1)
    return position.double(), segments[:, 4].double()[row]


def sa3d_angles(segments: Tensor, tokens: int, head_dim: int, offset: int = 0) -> Tensor:
    """Rotation angles.

    Args:
        segments: ``[n, 5]`` rows (token_start, T, H, W, source id).
        tokens: Number of tokens: all that the rows cover, or a slice of them.
        head_dim: Dimensions of a head, even.
        offset: Number of the slice's first token.

    Returns:
        ``[tokens, head_dim / 2]`` float64, in radians.
    """
    position, source_id = token_positions(segments, tokens, offset)

    def frequencies(dim: int) -> Tensor:
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=segments.device) / dim
        return THETA**-exponent

    spatial = [position[:, axis, None] * frequencies(dim) for axis, dim in enumerate(axis_dims(head_dim))]
    return torch.cat(spatial, dim=-1) + source_id[:, None] * frequencies(head_dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs ``(x[2k], x[2k + 1])``.

    Args:
        x: ``[tokens, heads, head_dim]``.
        cos: ``[tokens, head_dim / 2]``.
        sin: ``[tokens, head_dim / 2]``.

    Returns:
        ``[tokens, heads, head_dim]`` in the dtype of ``cos``.
    """
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2))
    # Swapped pairs times (-sin, sin), rather than two halves put together: compilers fuse this with what surrounds it.
    signed_sin = torch.stack([-sin, sin], dim=-1)
    return (pairs * cos[:, None, :, None] + pairs.flip(-1) * signed_sin[:, None]).flatten(-2)

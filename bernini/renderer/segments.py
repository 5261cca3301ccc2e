"""Other ways than SA-3D RoPE to tell the segments of a sample apart, to compare it with; no released model has them."""

from typing import Literal

import torch
from torch import Tensor, nn

SegmentEncoding = Literal["sa3d", "plain", "embedding"]
ROWS = 16


class SegmentEmbedding(nn.Module):
    """One learned vector per source id, zero at first; a fractional id lies on the line between its neighbours.

    Args:
        dim: Width of the tokens.
        rows: Ids 0..rows-1 have a vector; ids from ``rows`` on have none, which is the zero vector.
    """

    def __init__(self, dim: int, rows: int = ROWS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, dim))

    def forward(self, segments: Tensor, tokens: int) -> Tensor:
        """The vector of every token's segment.

        Args:
            segments: ``[n, 5]`` rows (token_start, T, H, W, source id).
            tokens: Number of tokens that the rows cover.

        Returns:
            ``[tokens, dim]``.
        """
        ids = torch.arange(len(self.weight), device=segments.device)
        shares = (1 - (segments[:, 4:] - ids).abs()).clamp(min=0)
        lengths = segments[:, 1:4].prod(dim=1).long()
        vectors = shares.to(self.weight.dtype) @ self.weight
        return vectors.repeat_interleave(lengths, dim=0, output_size=tokens)


def without_ids(segments: Tensor) -> Tensor:
    """The rows ``[n, 5]`` with source id 0 everywhere: under these, SA-3D RoPE is Wan's 3D RoPE."""
    return torch.cat([segments[:, :4], torch.zeros_like(segments[:, 4:])], dim=1)

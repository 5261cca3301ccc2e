"""What a block does between its matrix products and attention, in fp32 inside."""

import torch.nn.functional as F
from torch import Tensor


def spread(rows: Tensor, sample_index: Tensor | None) -> Tensor:
    """Give each token its sample's row; a single one broadcasts and costs nothing.

    Args:
        rows: ``[samples, dim]``.
        sample_index: ``[tokens]`` int64 sample of each token; null if there is one sample.

    Returns:
        ``[tokens, dim]``, or ``[dim]`` for all tokens: with a leading 1, the gradient of a compiled norm has the wrong
        shape on CUDA in torch 2.11.
    """
    return rows[0] if sample_index is None else rows.index_select(0, sample_index)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, then a scale and a shift (adaLN).

    Args:
        x: ``[tokens, dim]``.
        scale: ``[tokens, dim]``, or ``[dim]`` for all tokens; added to 1.
        shift: As ``scale``.
        eps: Added to the variance.

    Returns:
        ``[tokens, dim]`` in the dtype of ``x``.
    """
    return (F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * y``.

    Args:
        x: ``[tokens, dim]``.
        y: ``[tokens, dim]``.
        gate: ``[tokens, dim]``, or ``[dim]`` for all tokens, fp32, which makes the sum so.

    Returns:
        ``[tokens, dim]`` in the dtype of ``x``.
    """
    return (x + y * gate).to(x.dtype)

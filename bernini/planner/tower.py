"""Qwen2.5-VL's vision tower with one attention call per layer, and without a wait for the device.

Frames attend within themselves, in most layers within windows of them. Transformers cuts the sequence into these
segments and attends to one after the other, hundreds of calls for a packed batch; only to FlashAttention it hands them
over whole. The attention here is registered as one of that kind, and needs no further package.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from bernini.attention import Lengths, has_varlen, packed_attention
from bernini.planner.vision import Grid, Visual

SEGMENTS = "bernini_flash_segments"
"""``_attn_implementation`` of the tower; the ``flash`` in it has transformers hand all segments over at once."""


def attend_at_once(tower: PreTrainedModel) -> None:
    """Have a tower attend to all segments at once.

    It is told to one that is built: while it builds one, transformers looks for a package behind any ``flash``.
    """
    tower.config._attn_implementation = SEGMENTS


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within segments that lie side by side: ``[1, heads, n, head_dim]`` to ``[1, n, heads, head_dim]``."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if has_varlen(q.device, q.dtype, q.shape[-1]):
        out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        assert isinstance(out, Tensor)
    else:
        out = _by_length(q, k, v, cu_seq_lens_q)
    return out[None], None


def _by_length(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """The same on any device: segments of equal length share a call."""
    lengths = starts.diff()
    order = lengths.repeat_interleave(lengths, output_size=len(q)).argsort(stable=True)
    q, k, v = (x.index_select(0, order) for x in (q, k, v))
    pairs = tuple((length, length) for length in lengths.sort().values.tolist())
    out = packed_attention(q, k, v, Lengths(pairs, starts, starts), "native")
    return torch.empty_like(out).index_copy(0, order, out)


AttentionInterface.register(SEGMENTS, _attend)


@dataclass(frozen=True)
class Layout:
    """How the tower orders the patches of a visual.

    Attributes:
        position_ids: ``[n, 2]`` row and column of each patch.
        window_index: ``[n / merge**2]`` merged patches, one window after the other.
        frames: Patches of each frame.
        windows: Patches of each window.
    """

    position_ids: Tensor
    window_index: Tensor
    frames: list[int]
    windows: list[int]


@lru_cache(maxsize=4096)
def _layout(grid: Grid, merge: int, window: int, patch: int) -> Layout:
    grids = torch.tensor([grid])
    index, starts = get_vision_window_index(grids, merge, window, patch)
    return Layout(
        position_ids=get_vision_position_ids(grids, merge),
        window_index=index,
        frames=get_vision_cu_seqlens(grids).diff().tolist(),
        windows=starts.diff().tolist(),
    )


def embed(tower: PreTrainedModel, visuals: Sequence[Visual]) -> Tensor:
    """Embeddings ``[tokens, D]`` of visuals with patches, one after the other; of a frozen tower without a gradient.

    Without any visual the tower runs on zeros, of which nothing is left: ranks that share its weights or gradients do
    alike.
    """
    own: Any = tower
    weight, config = next(own.parameters()), own.config
    grids = [visual.grid for visual in visuals] or [(1, config.spatial_merge_size, config.spatial_merge_size)]
    columns = config.in_channels * config.temporal_patch_size * config.patch_size**2
    empty = torch.zeros(config.spatial_merge_size**2, columns)
    patches = torch.cat([visual.patches for visual in visuals] or [empty])
    grid_thw = torch.tensor(grids, device=weight.device)
    # Left to itself, the tower would work these out from the grids, waiting for the device at every visual.
    known = layout(grids, config, weight.device)
    # Gradient checkpointing in transformers has even a frozen tower run in the backward pass, for no one.
    trained = any(parameter.requires_grad for parameter in own.parameters())
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        features = own(patches.to(weight.device, weight.dtype), grid_thw=grid_thw, **known).pooler_output
    return features if visuals else features[:0]


def layout(grids: Sequence[Grid], config: Any, device: torch.device) -> dict[str, Any]:
    """What the tower works out from the grids of a batch, as its forward takes it.

    Args:
        grids: ``(t, h, w)`` of each visual, in patches.
        config: The tower's configuration.
        device: Where the tower runs.
    """
    own = [_layout(grid, config.spatial_merge_size, config.window_size, config.patch_size) for grid in grids]
    indices, before = [], 0
    for one in own:
        indices.append(one.window_index + before)
        before += len(one.window_index)
    frames = [length for one in own for length in one.frames]
    windows = [length for one in own for length in one.windows]
    return {
        "position_ids": torch.cat([one.position_ids for one in own]).to(device),
        "window_index": torch.cat(indices).to(device),
        "cu_seqlens": _starts(frames).to(device),
        "cu_window_seqlens": _starts(windows).to(device),
        "max_seqlen": max(frames),
        "max_window_seqlen": max(windows),
    }


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def fingerprint(tower: nn.Module) -> str:
    """What tells towers of different weights apart: a hash of some hundred values of each tensor, spread over it.

    It is that of bfloat16 numbers, so that the dtype in which weights are held makes no difference.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        values = tensor.flatten()[:: max(1, tensor.numel() // 256)].to("cpu", torch.bfloat16)
        digest.update(name.encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]

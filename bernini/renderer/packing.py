"""Samples of any tasks and sizes laid end to end in one sequence, without padding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bernini.errors import DataError
from bernini.stacking import map_stacked


@dataclass
class Segment:
    """One latent of a sample.

    Attributes:
        latent: ``[C, T, H, W]`` normalised latent; the noised one for a target.
        source_id: 0 for a target, else 1 or more; may be fractional.
    """

    latent: Tensor
    source_id: float

    @property
    def is_target(self) -> bool:
        """Whether the model has to predict this segment."""
        return self.source_id == 0


@dataclass
class PackedSample:
    """One sample before packing.

    Attributes:
        segments: Conditions and targets, in any order.
        context: ``[rows, text_dim]`` text (and plan) of the sample; every row is attended.
        timestep: Timestep of all its tokens, in 0..1000; the conditions share it.
    """

    segments: list[Segment]
    context: Tensor
    timestep: float


@dataclass(frozen=True)
class Pack:
    """Several samples as one sequence.

    Attributes:
        patches: ``[tokens, C * pt * ph * pw]``, channel slowest, as the weights of Wan's patch embedding.
        segments: ``[n, 5]`` float32 rows (token_start, T, H, W, source id).
        sample_index: ``[tokens]`` sample of each token.
        target_index: ``[target_tokens]`` tokens to be predicted.
        timesteps: ``[samples]`` float32.
        context: ``[rows, text_dim]``.
        token_starts: ``[samples + 1]`` int32, the first token of each sample, and the end.
        context_starts: The same of the context rows.
        token_lengths: Tokens per sample.
        context_lengths: Context rows per sample.
        target_lengths: Tokens per target, in packing order.
        target_grids: (T, H, W) in patches per target.
        token_seen: Bool ``[tokens]``, those that are attended, at least one of each sample; all if null.
        context_seen: The same of the context rows.
    """

    patches: Tensor
    segments: Tensor
    sample_index: Tensor
    target_index: Tensor
    timesteps: Tensor
    context: Tensor
    token_starts: Tensor
    context_starts: Tensor
    token_lengths: tuple[int, ...]
    context_lengths: tuple[int, ...]
    target_lengths: tuple[int, ...]
    target_grids: tuple[tuple[int, int, int], ...]
    token_seen: Tensor | None = None
    context_seen: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.patches.shape[0]


def grid_of(latent: Tensor, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Patches (T, H, W) of a latent ``[..., C, T, H, W]``.

    Raises:
        DataError: The latent is not a multiple of the patch.
    """
    if latent.ndim < 4 or any(size % p or not size for size, p in zip(latent.shape[-3:], patch, strict=True)):
        raise DataError(
            f"a latent of shape {list(latent.shape)} cannot be cut into patches of {list(patch)}",
            why="the model wants [channels, frames, height, width] in multiples of the patch",
            fix="prepare clips with sizes that are multiples of 16 pixels",
        )
    t, h, w = (size // p for size, p in zip(latent.shape[-3:], patch, strict=True))
    return t, h, w


def patchify(latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Cut latents into patches.

    Args:
        latents: ``[..., C, T, H, W]``.
        patch: Patch size (pt, ph, pw).

    Returns:
        ``[..., T/pt * H/ph * W/pw, C * pt * ph * pw]``, channel slowest.

    Raises:
        DataError: The latents are not a multiple of the patch.
    """
    (t, h, w), (pt, ph, pw) = grid_of(latents, patch), patch
    batch, channels = latents.shape[:-4], latents.shape[-4]
    cut = latents.reshape(-1, channels, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return cut.reshape(*batch, t * h * w, -1)


def target_patches(latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Cut latents as the model writes its output: ``[..., tokens, pt * ph * pw * C]``, channel fastest."""
    return patchify(latents, patch).unflatten(-1, (latents.shape[-4], -1)).transpose(-1, -2).flatten(-2)


def unpatchify(rows: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Put the model's output rows back together.

    Args:
        rows: ``[tokens, pt * ph * pw * C]``, channel fastest.
        grid: (T, H, W) in patches.
        patch: Patch size.

    Returns:
        ``[C, T * pt, H * ph, W * pw]``.
    """
    (t, h, w), (pt, ph, pw) = grid, patch
    cube = rows.reshape(t, h, w, pt, ph, pw, -1).permute(6, 0, 3, 1, 4, 2, 5)
    return cube.reshape(-1, t * pt, h * ph, w * pw)


def pad_context(features: Tensor, rows: int) -> Tensor:
    """Text features with zero rows up to ``rows``: the released renderer attends to them.

    Longer features are cut, as its tokenizer does.
    """
    return F.pad(features[:rows], (0, 0, 0, max(0, rows - features.shape[0])))


def pack(samples: Sequence[PackedSample], patch: tuple[int, int, int]) -> Pack:
    """Lay samples end to end.

    Raises:
        DataError: A latent does not fit the patch size, a source id is negative, or there is nothing to pack.
    """
    if not samples or not all(s.segments for s in samples):
        raise DataError("nothing to pack", why="a pack needs samples, and each sample a segment")
    device = samples[0].context.device
    table, targets, target_grids, token_lengths = [], [], [], []
    start = 0
    for sample in samples:
        first = start
        for segment in sample.segments:
            grid = grid_of(segment.latent, patch)
            if not 0 <= segment.source_id < math.inf:
                raise DataError(
                    f"a segment has source id {segment.source_id}", why="0 is a target, sources have 1 or more"
                )
            tokens = math.prod(grid)
            table.append((start, *grid, segment.source_id))
            if segment.is_target:
                targets.append(np.arange(start, start + tokens))
                target_grids.append(grid)
            start += tokens
        token_lengths.append(start - first)
    latents = [segment.latent for sample in samples for segment in sample.segments]
    target_index = np.concatenate(targets) if targets else np.empty(0, np.int64)
    context_lengths = [sample.context.shape[0] for sample in samples]

    def starts(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    return Pack(
        patches=torch.cat(map_stacked(lambda stacked: patchify(stacked, patch), latents)),
        segments=torch.tensor(table, dtype=torch.float32, device=device),
        sample_index=torch.from_numpy(np.repeat(np.arange(len(samples)), token_lengths)).to(device),
        target_index=torch.from_numpy(target_index).to(device),
        timesteps=torch.tensor([sample.timestep for sample in samples], dtype=torch.float32, device=device),
        context=torch.cat([s.context for s in samples]),
        token_starts=starts(token_lengths),
        context_starts=starts(context_lengths),
        token_lengths=tuple(token_lengths),
        context_lengths=tuple(context_lengths),
        target_lengths=tuple(map(len, targets)),
        target_grids=tuple(target_grids),
    )


def interpolate_ids(sources: int, trained: int = 5) -> list[float]:
    """Source ids 1..n, squeezed into the trained range when there are more sources than that.

    The released sampler does this (``max_trained_src_id`` 5); training always uses integers.
    """
    if sources <= trained:
        return [float(i) for i in range(1, sources + 1)]
    return torch.linspace(1, trained, sources, dtype=torch.float64).tolist()

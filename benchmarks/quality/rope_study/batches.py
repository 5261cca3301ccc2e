"""Batches of equal samples as packs, without work per sample."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.quality.rope_study.data import Batch
from bernini.renderer.attention import AttentionBackend
from bernini.renderer.packing import Pack, PackedSample, Segment, pack, patchify, unpatchify
from bernini.renderer.transformer import PackedWanTransformer3DModel


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the pack of a batch; other batches of the same shapes only bring other values.

    Attributes:
        template: A pack of such a batch.
        patch: Patch size (pt, ph, pw).
    """

    template: Pack
    patch: tuple[int, int, int]

    @classmethod
    def of(cls, batch: Batch, ids: Sequence[float], patch: tuple[int, int, int]) -> "Layout":
        """Lay out a batch whose sources have the given ids."""
        samples = [
            PackedSample([*map(Segment, sources, ids), Segment(target, 0)], context, 0.0)
            for sources, target, context in zip(batch.sources, batch.targets, batch.contexts, strict=True)
        ]
        return cls(pack(samples, patch), patch)

    def fill(self, batch: Batch, noised: Tensor, timesteps: Tensor) -> Pack:
        """The pack of a batch.

        Args:
            batch: Gives sources and contexts.
            noised: ``[B, C, t, h, w]``.
            timesteps: ``[B]``, in 0..1000.
        """
        sources = patchify(batch.sources, self.patch).flatten(1, 2)
        patches = torch.cat([sources, patchify(noised, self.patch)], dim=1).flatten(0, 1)
        return replace(self.template, patches=patches, timesteps=timesteps, context=batch.contexts.flatten(0, 1))

    def latents(self, rows: Tensor) -> Tensor:
        """Output rows of the targets, ``[B * tokens, C * pt * ph * pw]``, as latents ``[B, C, t, h, w]``."""
        grids, lengths = self.template.target_grids, self.template.target_lengths
        parts = zip(rows.split(list(lengths)), grids, strict=True)
        return torch.stack([unpatchify(part, grid, self.patch) for part, grid in parts])


def attention(device: torch.device) -> AttentionBackend:
    """Backend for many shapes of short sequences: cuDNN, the default on CUDA, would plan each."""
    return "flash" if device.type == "cuda" else "auto"


def predict(model: PackedWanTransformer3DModel, packed: Pack) -> Tensor:
    """Velocity of the targets, ``[B * tokens, C * pt * ph * pw]`` fp32; in bfloat16 inside on CUDA."""
    device = packed.patches.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
        return model(packed)[packed.target_index].float()

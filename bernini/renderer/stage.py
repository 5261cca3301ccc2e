"""Samples that one transformer predicts step after step, while only their latents and the timestep change."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch
from torch import Tensor

from bernini.attention import Lengths
from bernini.renderer.packing import Pack, PackedSample, grid_of, pack, patchify, unpatchify
from bernini.renderer.transformer import Kept, KeysValues, PackedWanTransformer3DModel
from bernini.sharding import most_of_ranks
from bernini.stacking import cut, group, map_stacked


@dataclass(frozen=True)
class _Part:
    """Samples that share a forward.

    Attributes:
        places: Their places among all samples.
        pack: The samples as they lie side by side.
        kept: What does not change over the steps.
    """

    places: list[int]
    pack: Pack
    kept: Kept | None


class Stage:
    """Runs one transformer over the same samples in every step.

    Keys and values of cross-attention are made once for each distinct tensor among the samples' contexts, whoever reads
    it; with the packs and their rotations they live as long as the stage.

    Args:
        model: The transformer.
        samples: What it sees, with one target each, of whose latent only the shape matters.
        max_pack: Most samples in one forward.
        max_tokens: Most tokens in one forward; a larger sample goes alone.
        cache: Keep what does not change over the steps.
    """

    def __init__(
        self,
        model: PackedWanTransformer3DModel,
        samples: Sequence[PackedSample],
        max_pack: int,
        max_tokens: int,
        cache: bool,
    ) -> None:
        self._model = model
        # Samples that read one context lie side by side: they attend to it as one, and what a pack reads is one slice.
        readers = group(id(sample.context) for sample in samples)
        contexts = [samples[places[0]].context for places in readers]
        keys_values = model.keys_values(torch.cat(contexts)) if cache else None
        rows = accumulate((len(context) for context in contexts), initial=0)
        starts = dict(zip(map(id, contexts), rows, strict=False))
        order = [place for places in readers for place in places]
        tokens = [sum(math.prod(grid_of(s.latent, model.patch)) for s in samples[place].segments) for place in order]
        self._parts = []
        for part in cut(tokens, max_tokens, max_pack):
            places = [order[at] for at in part]
            own = [samples[place] for place in places]
            packed, kept = pack(own, model.patch), None
            if keys_values is not None:
                kept = _keep(model, packed, own, keys_values, starts[id(own[0].context)])
            self._parts.append(_Part(places, packed, kept))
        self._forwards = most_of_ranks(len(self._parts), model)

    def predict(self, latents: Sequence[Tensor], timestep: float) -> list[Tensor]:
        """The velocity of every sample.

        Args:
            latents: ``[C, T, H, W]`` noised latent of each sample.
            timestep: In 0..1000.

        Returns:
            ``[C, T, H, W]`` fp32 for each sample.
        """
        patches = map_stacked(lambda stacked: patchify(stacked, self._model.patch), latents)
        found: dict[int, Tensor] = {}
        for number in range(self._forwards):
            part = self._parts[number % len(self._parts)]  # where other ranks have more, the first ones run again
            part.pack.patches[part.pack.target_index] = torch.cat([patches[place] for place in part.places])
            packed = replace(part.pack, timesteps=torch.full_like(part.pack.timesteps, timestep))
            rows = self._model(packed, part.kept)[packed.target_index].float().split(list(packed.target_lengths))
            for place, own, cells in zip(part.places, rows, packed.target_grids, strict=True):
                found[place] = unpatchify(own, cells, self._model.patch)
        return [found[place] for place in range(len(latents))]


def _keep(
    model: PackedWanTransformer3DModel,
    packed: Pack,
    samples: Sequence[PackedSample],
    keys_values: Sequence[KeysValues],
    start: int,
) -> Kept:
    """Rotation, and the rows of all contexts from ``start`` on that the samples read, in their order."""
    pairs = []
    for _, readers in groupby(zip(samples, packed.token_lengths, strict=True), lambda reader: id(reader[0].context)):
        (sample, *_), tokens = zip(*readers, strict=True)
        pairs.append((sum(tokens), len(sample.context)))
    end = start + sum(rows for _, rows in pairs)
    lengths = Lengths.of(pairs, packed.context.device) if len(pairs) > 1 else None
    return Kept(model.rotation(packed), [(k[start:end], v[start:end]) for k, v in keys_values], lengths)

"""Streams, the sequences that a plan is conditioned on, and how their hidden states are read while targets change."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from transformers import Qwen2_5_VLTextModel

from bernini.planner.masking import TARGET, visible
from bernini.planner.mllm import PrefixCache, additive_mask, run_text
from bernini.stacking import cut

KEYS = 128  # sequences are filled up to a multiple, so that prompts of many lengths share a recording
GIVEN_AT_ONCE = 2048  # tokens of text and sources that share a forward: what they do not see of each other is computed


@dataclass(frozen=True)
class Stream:
    """One conditioning of a plan, as the language model takes it.

    Attributes:
        embeds: ``[n, D]`` input embeddings, the mask token where the target is.
        position_ids: ``[3, n]`` positions in time, height and width.
        token_type: ``[n]`` text, source or target.
        segment_id: ``[n]``; tokens of one visual share it.
    """

    embeds: Tensor
    position_ids: Tensor
    token_type: Tensor
    segment_id: Tensor

    @cached_property
    def target(self) -> Tensor:
        """``[N]`` indices of the target tokens."""
        return torch.nonzero(self.token_type == TARGET).squeeze(1)

    @cached_property
    def given(self) -> Tensor:
        """``[n - N]`` indices of text and sources."""
        return torch.nonzero(self.token_type != TARGET).squeeze(1)

    @cached_property
    def visible(self) -> Tensor:
        """Bool ``[n, n]``."""
        return visible(self.token_type, self.segment_id)


class Reader(Protocol):
    """Reads hidden states of streams whose targets keep changing."""

    def targets(self, embeds: Tensor) -> Tensor:
        """Hidden states ``[rows, N, D]`` of the targets ``embeds [rows, N, D]`` of the first streams."""
        ...

    def given(self, row: int) -> Tensor:
        """Hidden states ``[n - N, D]`` of the text and the sources of a stream, whatever its target."""
        ...


class WholeReader:
    """Forwards every stream whole, one by one, as the released loop does.

    Args:
        model: The text model.
        streams: Streams of any lengths with equally many target tokens.
        requests: How many requests they are of.
    """

    def __init__(self, model: Qwen2_5_VLTextModel, streams: Sequence[Stream], requests: int) -> None:
        self.model, self.streams = model, streams
        self.last: dict[int, Tensor] = {}  # hidden states of a stream's last forward

    def targets(self, embeds: Tensor) -> Tensor:
        """See `Reader`."""
        return torch.stack([self._run(row, target)[self.streams[row].target] for row, target in enumerate(embeds)])

    def given(self, row: int) -> Tensor:
        """See `Reader`."""
        stream = self.streams[row]
        if row not in self.last:
            self._run(row, stream.embeds[stream.target])
        return self.last[row][stream.given]

    def _run(self, row: int, target: Tensor) -> Tensor:
        stream = self.streams[row]
        inputs = stream.embeds.index_copy(0, stream.target, target)
        states = run_text(self.model, inputs[None], stream.position_ids[:, None], stream.visible)
        self.last[row] = states.penultimate[0]
        return self.last[row]


class PrefixReader:
    """Forwards text and sources once and from then on the targets alone, all streams in one batch.

    It is exact because nothing but the target sees the target.

    Args:
        model: The text model.
        streams: Streams of any lengths with equally many target tokens: the first ones of all requests, the second ones
            of all requests, and so on.
        requests: How many requests they are of. The text and the sources of a request's streams share a forward, and so
            do those of several short requests.
    """

    def __init__(self, model: Qwen2_5_VLTextModel, streams: Sequence[Stream], requests: int) -> None:
        self.model = model
        own = [range(request, len(streams), requests) for request in range(requests)]
        read: dict[int, tuple[Tensor, PrefixCache]] = {}
        for some in cut([sum(len(streams[row].given) for row in rows) for rows in own], GIVEN_AT_ONCE):
            rows = [row for request in some for row in own[request]]
            read.update(zip(rows, run_given(model, [streams[row] for row in rows]), strict=True))
        found = [read[row] for row in range(len(streams))]
        self.hidden = [hidden for hidden, _ in found]
        tokens = len(streams[0].target)
        keys = -(-max(len(stream.embeds) for stream in streams) // KEYS) * KEYS
        self.cache = PrefixCache.stack([cache for _, cache in found], keys - tokens)
        self.positions = torch.stack([stream.position_ids[:, stream.target] for stream in streams], 1)
        mask = torch.zeros(len(streams), tokens, keys, dtype=torch.bool, device=streams[0].embeds.device)
        for row, stream in zip(mask, streams, strict=True):
            seen = stream.visible[stream.target]
            row[:, : len(stream.given)] = seen[:, stream.given]
            row[:, keys - tokens :] = seen[:, stream.target]
        self.mask = additive_mask(mask, streams[0].embeds.dtype)

    @property
    def state(self) -> list[Tensor]:
        """All that `targets` reads besides its argument and the weights."""
        return [self.positions, self.mask, *(x for layer in self.cache.layers for x in layer)]

    def targets(self, embeds: Tensor) -> Tensor:
        """See `Reader`."""
        rows = len(embeds)
        return run_text(
            self.model, embeds, self.positions[:, :rows], self.mask[:rows], self.cache.first(rows)
        ).penultimate

    def given(self, row: int) -> Tensor:
        """See `Reader`."""
        return self.hidden[row]


def run_given(model: Qwen2_5_VLTextModel, streams: Sequence[Stream]) -> list[tuple[Tensor, PrefixCache]]:
    """Forward text and sources of streams in one sequence, in which they do not see each other.

    Args:
        model: The text model.
        streams: Streams of any lengths.

    Returns:
        Hidden states ``[n - N, D]`` of each stream, and the cache of its keys and values.
    """
    parts = [(s.embeds[s.given], s.position_ids[:, s.given], s.visible[s.given][:, s.given]) for s in streams]
    embeds, positions, tables = zip(*parts, strict=True)
    cache, lengths = PrefixCache(), [len(part) for part in embeds]
    seen = torch.block_diag(*tables).bool()
    hidden = run_text(model, torch.cat(embeds)[None], torch.cat(positions, 1)[:, None], seen, cache).penultimate[0]
    return list(zip(hidden.split(lengths), cache.split(lengths), strict=True))

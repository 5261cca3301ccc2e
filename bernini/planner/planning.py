"""Masked planning: draw the target's ViT embeddings a few at a time, and make the renderer's contexts of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from transformers import Qwen2_5_VLTextModel

from bernini.errors import ConfigError, DataError
from bernini.planner.connector import Connector
from bernini.planner.flow_head import FlowHead, guidance_weights
from bernini.planner.flow_head import Stream as StreamName
from bernini.planner.masking import TARGET, visible
from bernini.planner.mllm import PrefixCache, additive_mask, run_text
from bernini.planner.reveal import Order, reveal_counts, reveal_order, uncertainty
from bernini.stacking import group


@dataclass
class PlanningConfig:
    """How plans are made; the defaults are those of the released command line.

    Attributes:
        steps: Planning steps K; with more steps than tokens each token is revealed alone.
        flow_steps: Steps of the flow head.
        txt: Guidance from the stream with text alone to the one with text and sources.
        img: Guidance from the empty stream to the one with text alone. 1 and 1 is no guidance.
        order: ``random`` is the released one. ``halton`` spreads what is revealed evenly. ``confidence`` reveals at
            each step the tokens that the flow head is surest of (`bernini.planner.reveal.uncertainty`).
        cache: Keep keys and values of text and sources, and forward the target tokens alone. The numbers are the same.
    """

    steps: int = 25
    flow_steps: int = 5
    txt: float = 1.2
    img: float = 1.0
    order: Order = "random"
    cache: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "flow_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"planning.{name} is {getattr(self, name)}", why="it has to be at least 1")
        if self.order not in ("random", "halton", "confidence"):
            raise ConfigError(f"unknown planning.order {self.order!r}", fix="random, halton or confidence")


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


@dataclass(frozen=True)
class PlanRequest:
    """What to plan.

    Attributes:
        cond: Text and sources.
        uncond: The negative prompt, no sources.
        imgcond: Text without its sources, by the name that the released code gives it. Null if there are no sources: it
            would be ``cond`` once more, and is not run.
        seed: Seed of order and noise.
        grid: ``(t, h, w)`` of the target in tokens; only the order ``halton`` needs it.
    """

    cond: Stream
    uncond: Stream
    imgcond: Stream | None = None
    seed: int = 42
    grid: tuple[int, int, int] | None = None

    def check(self) -> "PlanRequest":
        """Return self if the streams agree on the target.

        Raises:
            DataError: They do not, or there is no target.
        """
        counts = {name: len(stream.target) for name, stream in vars(self).items() if isinstance(stream, Stream)}
        if not self.cond.target.numel() or len(set(counts.values())) > 1:
            raise DataError(
                "the streams of a plan do not agree on a target" if any(counts.values()) else "a plan without a target",
                why=f"target tokens by stream: {counts}",
                fix="encode every stream with the same target grid",
            )
        return self


@dataclass(frozen=True)
class Plan:
    """A plan and the contexts of the renderer's arms, in the released names.

    Attributes:
        embeds: ``[N, D]`` ViT embeddings of the target.
        wtxt_wvit: ``[n, G]`` rows of text, sources and plan, in the order of the sequence.
        wtxt_wovit: ``[n - N, G]`` rows of text and sources.
        wotxt_wvit: ``[N, G]`` rows of the plan.
        wotxt_wovit: ``[m, G]`` rows of the negative prompt.
    """

    embeds: Tensor
    wtxt_wvit: Tensor
    wtxt_wovit: Tensor
    wotxt_wvit: Tensor
    wotxt_wovit: Tensor


class Planner:
    """Makes plans with a text model, a connector and a flow head; it owns none of them.

    Args:
        text_model: Qwen2.5-VL's text model.
        connector: Hidden states to the flow head and to the renderer.
        flow_head: Draws embeddings.
    """

    def __init__(self, text_model: Qwen2_5_VLTextModel, connector: Connector, flow_head: FlowHead) -> None:
        self.text_model, self.connector, self.flow_head = text_model, connector, flow_head

    @torch.no_grad()
    def plan(self, requests: Sequence[PlanRequest], config: PlanningConfig) -> list[Plan]:
        """Plan for each request; those with equally many target tokens go together.

        A request's order and noise come from its own seed, on the CPU, whatever its company.

        Args:
            requests: What to plan.
            config: How to plan.

        Raises:
            ConfigError: The text model is in training mode, or the order ``halton`` lacks a grid.
            DataError: A request without a target, or with streams that disagree on it.
        """
        if self.text_model.training:
            raise ConfigError(
                "planning with a text model in training mode",
                why="dropout would be on, and gradient checkpointing would drop the prefix cache",
                fix="call .eval() first",
            )
        plans: dict[int, Plan] = {}
        for rows in group((len(r.check().cond.target), r.imgcond is None) for r in requests):
            plans.update(zip(rows, self._plan_alike([requests[row] for row in rows], config), strict=True))
        return [plans[row] for row in range(len(requests))]

    def _plan_alike(self, requests: Sequence[PlanRequest], config: PlanningConfig) -> list[Plan]:
        # Without sources imgcond is cond, so only img counts: with txt equal to it, imgcond cancels out.
        txt = config.img if requests[0].imgcond is None else config.txt
        others = [name for name in guidance_weights(txt, config.img) if name != "cond"]
        names: list[StreamName] = ["cond", *others]  # cond is needed for the contexts, whatever it weighs
        streams = [getattr(request, name) for name in names for request in requests]
        reader = (PrefixReader if config.cache else WholeReader)(self.text_model, streams)

        embeds = torch.stack([request.cond.embeds[request.cond.target] for request in requests])  # [R, N, D]
        counts = [count for count in reveal_counts(embeds.shape[1], config.steps) if count]
        order = self._first_order(requests, config).to(embeds.device)
        noise, probe = self._noise(requests, counts, embeds.shape[2])
        noise, probe = noise.to(embeds.device), probe.to(embeds.device)
        for count, drawn in zip(counts, noise.split(counts, 1), strict=True):
            hidden = reader.targets(embeds.repeat(len(names), 1, 1)).unflatten(0, (len(names), -1))  # [S, R, N, D]
            if config.order == "confidence":
                order = self._surest_last(order, hidden[0], probe)
            chosen = order[:, -count:, None].sort(1).values  # noise goes to a step's tokens by position, as released
            order = order[:, :-count]
            conditions = {
                name: self.connector.for_vit(states.take_along_dim(chosen, 1)).flatten(0, 1)
                for name, states in zip(names, hidden, strict=True)
            }
            values = self.flow_head.sample(conditions, drawn.flatten(0, 1), config.flow_steps, txt, config.img)
            values = values.unflatten(0, (-1, count)).to(embeds.dtype)
            embeds = embeds.scatter(1, chosen.expand_as(values), values)

        planned = reader.targets(embeds)  # of cond alone, whose streams come first
        negative = names.index("uncond") * len(requests) if "uncond" in names else None
        plans = []
        for row, request in enumerate(requests):
            empty = run_given(self.text_model, request.uncond) if negative is None else reader.given[negative + row]
            plans.append(self._contexts(request.cond, embeds[row], reader.given[row], planned[row], empty))
        return plans

    def _contexts(self, cond: Stream, embeds: Tensor, given: Tensor, planned: Tensor, empty: Tensor) -> Plan:
        rows, target_rows = self.connector.for_gen(given), self.connector.for_gen(planned)
        both = rows.new_empty(len(cond.embeds), rows.shape[-1])
        both[cond.given], both[cond.target] = rows, target_rows
        return Plan(embeds, both, rows, target_rows, self.connector.for_gen(empty))

    def _first_order(self, requests: Sequence[PlanRequest], config: PlanningConfig) -> Tensor:
        """``[R, N]``, revealed from the end."""
        tokens = len(requests[0].cond.target)
        if config.order == "confidence":
            return torch.arange(tokens).expand(len(requests), -1)
        return torch.stack([reveal_order(tokens, r.seed, config.order, r.grid) for r in requests])

    def _noise(self, requests: Sequence[PlanRequest], counts: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
        """``[R, N, C]`` in the order of the reveal, and ``[C]`` for the order by confidence, on the CPU."""
        rows = []
        for request in requests:
            generator = torch.Generator().manual_seed(request.seed)
            rows.append(torch.cat([torch.randn(count, width, generator=generator) for count in counts]))
        return torch.stack(rows), torch.randn(width, generator=torch.Generator().manual_seed(0))

    def _surest_last(self, order: Tensor, hidden: Tensor, probe: Tensor) -> Tensor:
        condition = self.connector.for_vit(hidden.take_along_dim(order[..., None], 1))
        doubt = uncertainty(self.flow_head, condition, probe)
        return order.take_along_dim(doubt.argsort(dim=1, descending=True, stable=True), 1)


class Reader(Protocol):
    """Reads hidden states of streams whose targets keep changing.

    Attributes:
        given: ``[n - N, D]`` hidden states of each stream's text and sources, after the first call of `targets`.
    """

    given: list[Tensor]

    def targets(self, embeds: Tensor) -> Tensor:
        """Hidden states ``[rows, N, D]`` of the targets ``embeds [rows, N, D]`` of the first streams."""
        ...


class WholeReader:
    """Forwards every stream whole, one by one, as the released loop does.

    Args:
        model: The text model.
        streams: Streams of any lengths with equally many target tokens.
    """

    def __init__(self, model: Qwen2_5_VLTextModel, streams: Sequence[Stream]) -> None:
        self.model, self.streams = model, streams
        self.given = [stream.embeds[:0] for stream in streams]

    def targets(self, embeds: Tensor) -> Tensor:
        """See `Reader`."""
        found = []
        for row, target in enumerate(embeds):
            stream = self.streams[row]
            inputs = stream.embeds.index_copy(0, stream.target, target)
            hidden = run_text(self.model, inputs[None], stream.position_ids[:, None], stream.visible).penultimate[0]
            self.given[row] = hidden[stream.given]
            found.append(hidden[stream.target])
        return torch.stack(found)


class PrefixReader:
    """Forwards text and sources once and from then on the targets alone, all streams in one batch.

    It is exact because nothing but the target sees the target.

    Args:
        model: The text model.
        streams: Streams of any lengths with equally many target tokens.
    """

    def __init__(self, model: Qwen2_5_VLTextModel, streams: Sequence[Stream]) -> None:
        self.model = model
        caches = [PrefixCache() for _ in streams]
        self.given = [run_given(model, stream, cache) for stream, cache in zip(streams, caches, strict=True)]
        tokens = len(streams[0].target)
        keys = -(-max(len(stream.embeds) for stream in streams) // 8) * 8  # attention kernels want masks so aligned
        self.cache = PrefixCache.stack(caches, keys - tokens)
        self.positions = torch.stack([stream.position_ids[:, stream.target] for stream in streams], 1)
        mask = torch.zeros(len(streams), tokens, keys, dtype=torch.bool, device=streams[0].embeds.device)
        for row, stream in zip(mask, streams, strict=True):
            seen = stream.visible[stream.target]
            row[:, : len(stream.given)] = seen[:, stream.given]
            row[:, keys - tokens :] = seen[:, stream.target]
        self.mask = additive_mask(mask, streams[0].embeds.dtype)

    def targets(self, embeds: Tensor) -> Tensor:
        """See `Reader`."""
        rows = len(embeds)
        return run_text(
            self.model, embeds, self.positions[:, :rows], self.mask[:rows], self.cache.first(rows)
        ).penultimate


def run_given(model: Qwen2_5_VLTextModel, stream: Stream, cache: PrefixCache | None = None) -> Tensor:
    """Hidden states ``[n - N, D]`` of text and sources, which do not depend on the target; may fill a cache."""
    given = stream.given
    positions = stream.position_ids[:, None, given]
    seen = stream.visible[given][:, given]
    return run_text(model, stream.embeds[None, given], positions, seen, cache).penultimate[0]

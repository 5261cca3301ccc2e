"""Masked planning: draw the target's ViT embeddings a few at a time, and make the renderer's contexts of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers import Qwen2_5_VLTextModel

from bernini.errors import ConfigError, DataError
from bernini.planner.connector import Connector
from bernini.planner.flow_head import FlowHead, guidance_weights
from bernini.planner.flow_head import Stream as StreamName
from bernini.planner.readers import PrefixReader, Reader, Stream, WholeReader
from bernini.planner.recording import Recorded
from bernini.planner.reveal import Order, reveal_counts, reveal_order, uncertainty
from bernini.stacking import group

RECORDED_FROM = 5  # planning steps: the first is run and the second recorded, so that few have nothing to replay


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
        cuda_graphs: On CUDA, with the cache and at least five steps, record what a step runs and replay it in the rest.
            Sharded weights are not recorded.
    """

    steps: int = 25
    flow_steps: int = 5
    txt: float = 1.2
    img: float = 1.0
    order: Order = "random"
    cache: bool = True
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "flow_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"planning.{name} is {getattr(self, name)}", why="it has to be at least 1")
        if self.order not in ("random", "halton", "confidence"):
            raise ConfigError(f"unknown planning.order {self.order!r}", fix="random, halton or confidence")


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
        grid: ``(t, h, w)`` of the target in tokens, if the request told it.
    """

    embeds: Tensor
    wtxt_wvit: Tensor
    wtxt_wovit: Tensor
    wotxt_wvit: Tensor
    wotxt_wovit: Tensor
    grid: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Recording:
    """What the steps of plans of certain shapes run.

    Attributes:
        key: What a plan has to have in common with it.
        reader: Owner of the memory that `targets` reads.
        targets: Its method of that name.
        draw: `draw_tokens`.
    """

    key: tuple[Any, ...]
    reader: PrefixReader
    targets: Recorded
    draw: Recorded


class Planner:
    """Makes plans with a text model, a connector and a flow head; it owns none of them.

    It keeps one recording, with its prefix cache and the activations of a step, until plans of other shapes take its
    place, or of weights that are elsewhere in memory.

    Args:
        text_model: Qwen2.5-VL's text model.
        connector: Hidden states to the flow head and to the renderer.
        flow_head: Draws embeddings.
    """

    def __init__(self, text_model: Qwen2_5_VLTextModel, connector: Connector, flow_head: FlowHead) -> None:
        self.text_model, self.connector, self.flow_head = text_model, connector, flow_head
        self._recording: Recording | None = None

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

    @torch.no_grad()
    def adopt(self, requests: Sequence[PlanRequest], embeds: Sequence[Tensor]) -> list[Plan]:
        """Plans that show given embeddings, such as the true ones of a target.

        Args:
            requests: What they are plans of.
            embeds: ``[N, D]`` ViT embeddings of each.

        Raises:
            DataError: As `plan`, or embeddings are not those of so many tokens.
        """
        for request, own in zip(requests, embeds, strict=True):
            found, wanted = tuple(own.shape), tuple(request.check().cond.embeds[request.cond.target].shape)
            if found != wanted:
                raise DataError("embeddings that are no plan of the target", why=f"they are {found}, it is {wanted}")
        plans: dict[int, Plan] = {}
        for rows in group(len(own) for own in embeds):
            alike = [requests[row] for row in rows]
            streams = [*(request.cond for request in alike), *(request.uncond for request in alike)]
            reader = PrefixReader(self.text_model, streams, len(rows))
            shown = torch.stack([embeds[row] for row in rows]).to(streams[0].embeds)
            for at, (row, states) in enumerate(zip(rows, reader.targets(shown), strict=True)):
                given, empty = reader.given(at), reader.given(len(rows) + at)
                plans[row] = self._contexts(alike[at], shown[at], given, states, empty)
        return [plans[row] for row in range(len(requests))]

    def _plan_alike(self, requests: Sequence[PlanRequest], config: PlanningConfig) -> list[Plan]:
        # Without sources imgcond is cond, so only img counts: with txt equal to it, imgcond cancels out.
        txt = config.img if requests[0].imgcond is None else config.txt
        others = [name for name in guidance_weights(txt, config.img) if name != "cond"]
        names: list[StreamName] = ["cond", *others]  # cond is needed for the contexts, whatever it weighs
        every = [*names, *(("uncond",) if "uncond" not in names else ())]  # as is what precedes uncond's target
        streams = [getattr(request, name) for name in every for request in requests]
        reader: Reader = (PrefixReader if config.cache else WholeReader)(self.text_model, streams, len(requests))

        embeds = torch.stack([request.cond.embeds[request.cond.target] for request in requests])  # [R, N, D]
        counts = [count for count in reveal_counts(embeds.shape[1], config.steps) if count]
        order = self._first_order(requests, config).to(embeds.device)
        noise, probe = self._noise(requests, counts, embeds.shape[2])
        noise, probe = noise.to(embeds.device), probe.to(embeds.device)
        guidance = (tuple(names), config.flow_steps, txt, config.img)
        targets, draw, least = self._step(reader, guidance, embeds, counts, config.cuda_graphs)

        for count, drawn in zip(counts, noise.split(counts, 1), strict=True):
            hidden = targets(embeds.repeat(len(names), 1, 1)).unflatten(0, (len(names), -1))  # [S, R, N, D]
            if config.order == "confidence":
                order = self._surest_last(order, hidden[0], probe)
            chosen = order[:, -count:].sort(1).values  # noise goes to a step's tokens by position, as released
            order = order[:, :-count]
            spare = max(0, least - count)
            states = hidden.take_along_dim(pad(chosen, (0, spare))[None, ..., None], 2)
            values = draw(states, pad(drawn, (0, 0, 0, spare)))[:, :count].to(embeds.dtype)
            embeds = embeds.scatter(1, chosen[..., None].expand_as(values), values)

        planned = reader.targets(embeds)  # of cond alone, whose streams come first
        negative = every.index("uncond") * len(requests)
        return [
            self._contexts(request, embeds[row], reader.given(row), planned[row], reader.given(negative + row))
            for row, request in enumerate(requests)
        ]

    def _step(
        self, reader: Reader, guidance: tuple[Any, ...], embeds: Tensor, counts: Sequence[int], record: bool
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor], int]:
        """What a step runs: `Reader.targets`, `draw_tokens`, and to how many tokens the latter's are filled up."""
        draw = partial(draw_tokens, self.connector, self.flow_head, *guidance)
        if not (record and isinstance(reader, PrefixReader) and self._can_record(embeds, len(counts))):
            return reader.targets, draw, 0
        parts = (self.text_model, self.connector, self.flow_head)
        weights = [x.data_ptr() for part in parts for x in (*part.parameters(), *part.buffers())]
        shapes = [x.shape for x in (embeds, *reader.state)]
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = (*guidance, max(counts), shapes, embeds.dtype, weights, modes)
        if self._recording is None or self._recording.key != key:
            self._recording = None  # its memory goes before more is taken
            self._recording = Recording(key, reader, Recorded(reader.targets), Recorded(draw))
        else:
            for own, new in zip(self._recording.reader.state, reader.state, strict=True):
                own.copy_(new)
        return self._recording.targets, self._recording.draw, max(counts)

    def _can_record(self, embeds: Tensor, steps: int) -> bool:
        sharded = any(isinstance(weight, DTensor) for weight in self.text_model.parameters())
        return embeds.is_cuda and steps >= RECORDED_FROM and not sharded

    def _contexts(self, request: PlanRequest, embeds: Tensor, given: Tensor, planned: Tensor, empty: Tensor) -> Plan:
        cond = request.cond
        rows, target_rows = self.connector.for_gen(given), self.connector.for_gen(planned)
        both = rows.new_empty(len(cond.embeds), rows.shape[-1])
        both[cond.given], both[cond.target] = rows, target_rows
        return Plan(embeds, both, rows, target_rows, self.connector.for_gen(empty), request.grid)

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


def draw_tokens(
    connector: Connector,
    flow_head: FlowHead,
    names: Sequence[StreamName],
    flow_steps: int,
    txt: float,
    img: float,
    states: Tensor,
    noise: Tensor,
) -> Tensor:
    """Draw embeddings.

    Args:
        connector: Hidden states to conditions.
        flow_head: Draws.
        names: The S streams.
        flow_steps: Steps of the flow head.
        txt: See `PlanningConfig`.
        img: See `PlanningConfig`.
        states: ``[S, R, m, D]`` hidden states of the tokens to draw.
        noise: ``[R, m, C]``.

    Returns:
        ``[R, m, C]`` fp32.
    """
    conditions = dict(zip(names, connector.for_vit(states.flatten(1, 2)), strict=True))
    return flow_head.sample(conditions, noise.flatten(0, 1), flow_steps, txt, img).view_as(noise)

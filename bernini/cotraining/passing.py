"""From rows of a bank to the losses of planner and renderer, in calls whose shapes never change."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bernini.bank import Bank
from bernini.cotraining.bank import CoBank
from bernini.cotraining.banked_plans import BankedPlans, PlanDraws
from bernini.cotraining.exposure import KINDS, PlanExposure
from bernini.cotraining.sheets import lay_all_beside, tell_all
from bernini.planner.banked import SUMS as PLAN_SUMS
from bernini.planner.banked import PlanPass, take
from bernini.planner.flow_head import Draws
from bernini.renderer.bank import Stack
from bernini.renderer.banked import Noises, StackedPass
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.vae.codec import LatentCodec

COINS = ("text", "image", "video", "plan")
"""What `bernini.cotraining.conditions.ConditionDropout` leaves out, in its order."""
SUMS = (*PLAN_SUMS, "dit", "rendered")
"""What is summed over a sample: the planner's sums, the renderer's losses, and how many of these there are."""


class Beside(NamedTuple):
    """Plans other than the visible target tokens.

    Attributes:
        chosen: Bool ``[B]``, samples whose renderer reads one, unless it loses the plan.
        levels: ``[B]`` sigma of its noise, 1 for what the planner plans.
        values: ``[B, N, D]`` the noise.
        planned: Bool ``[B]``, samples that the planner plans; null where none are.
        plan: What is drawn for that; null likewise.
    """

    chosen: Tensor
    levels: Tensor
    values: Tensor
    planned: Tensor | None = None
    plan: PlanDraws | None = None


class CoDraws(NamedTuple):
    """What is drawn for a batch.

    Attributes:
        coins: Bool ``[B, 4]``, what samples lose, of `COINS`.
        masked: Bool ``[B, N]``, target tokens that are hidden.
        flow: Timesteps and noises of all B N target tokens; null without a visual loss.
        beside: Other plans; null where all are ``visible``.
        noises: The renderer's, of each expert.
    """

    coins: Tensor
    masked: Tensor
    flow: Draws | None
    beside: Beside | None
    noises: list[Noises]


class CoTrainingPass(nn.Module):
    """One forward of the planner, of which flow head, language head and renderer have their losses.

    Args:
        plans: The planner's pass, with rates of `COINS`.
        bank: The samples.
        experts: Models of the renderer, none where it is not wanted.
        sigmas: Noise levels of each expert, ``[stacks with clips, SIGMAS]``.
        codec: The frozen VAE.
        exposure: Which plan the renderer reads.
        visual: Whether the flow head's loss is wanted.
        drops_sources: Whether samples may lose sources.
    """

    def __init__(
        self,
        plans: PlanPass,
        bank: CoBank,
        experts: Mapping[str, PackedWanTransformer3DModel],
        sigmas: Mapping[str, Tensor],
        codec: LatentCodec,
        exposure: PlanExposure,
        visual: bool,
        drops_sources: bool,
    ) -> None:
        super().__init__()
        self.plans, self._bank, self._exposure, self._visual = plans, bank, exposure, visual
        self._drops_sources = drops_sources
        # Second targets have no use where nothing reads them.
        self._beside = exposure.visible < 1 and len(experts) > 0
        slots, device = plans.slots, bank.plans.task.device
        self._plan = BankedPlans(plans, exposure.planning, slots, device) if exposure.planned and experts else None
        self._ends = torch.tensor(exposure.shares, device=device).cumsum(0)
        self._clips = Bank(tuple(map(_trimmed, bank.clips.stacks)), bank.clips.counts)
        self._told_rows = [self._longest(stack.numbers) for stack in bank.stacks if stack.clips is not None]
        pairs = zip(self._clips.stacks, self._told_rows, strict=True)
        context_rows = [stack.text.shape[1] + told for stack, told in pairs]
        self.renders = nn.ModuleList(
            StackedPass(model, self._clips, codec, sigmas[name], context_rows=context_rows)
            for name, model in experts.items()
        )

    def forward(self, rows: Tensor) -> Tensor:
        """The losses of samples ``rows [B]`` of the bank under what `draw` draws: ``[B, 9]`` fp32 `SUMS`."""
        return self.measure(rows, self.draw(rows))

    def draw(self, rows: Tensor) -> CoDraws:
        """Draw conditions, what is hidden, which plan the renderer reads, and noises."""
        numbers, planner = self._bank.numbers(rows), self.plans.planner
        coins, masked = self.plans.throw(numbers), self.plans.hide(numbers)
        flow = planner.vit_decoder.draw(masked.numel(), device=rows.device) if self._visual else None
        beside = None
        if self._beside:
            which, level = torch.rand(2, len(rows), device=rows.device)
            kind = (self._ends[:-1, None] <= which * self._ends[-1]).sum(0)
            levels = level * self._exposure.level * (kind == KINDS.index("noised"))
            values = torch.randn(*masked.shape, planner.embedding.embedding_dim, device=rows.device)
            beside = Beside(kind != KINDS.index("visible"), levels, values)
            if self._plan is not None:
                planned = kind == KINDS.index("planned")
                plan = PlanDraws(self.plans.shuffle(numbers), torch.randn_like(values))
                beside = beside._replace(levels=torch.where(planned, 1.0, levels), planned=planned, plan=plan)
        shown = rows[: self._clips.batch_size]
        return CoDraws(coins, masked, flow, beside, [render.draw(shown) for render in self._passes])

    def measure(self, rows: Tensor, draws: CoDraws) -> Tensor:
        """The losses of samples under given draws.

        Args:
            rows: ``[B]`` rows of the stacks.
            draws: What `draw` gives.

        Returns:
            ``[B, 9]`` fp32 `SUMS`.
        """
        plans, numbers = self.plans, self._bank.numbers(rows)
        text, image, video, plan = draws.coins.unbind(1)
        neither = text & plan  # the planner reads nothing, then
        lost = torch.stack([neither, image | neither, video | neither], dim=1)
        sheets, features = plans.sheets(numbers, plans.variant(numbers, lost)), plans.see(numbers)
        second = None
        if draws.beside is not None:
            sheets, (second, number) = lay_all_beside(sheets, draws.beside.chosen & ~plan)
        shown = take(features, sheets.shows)
        if draws.beside is not None and second is not None:
            values = draws.beside.values
            if self._plan is not None and draws.beside.planned is not None and draws.beside.plan is not None:
                made = self._plan(numbers, lost, features, draws.beside.plan)
                values = torch.where(draws.beside.planned[:, None, None], made, values)
            values = take(values, number).to(shown.dtype)
            noised = torch.lerp(shown, values, draws.beside.levels[:, None, None].to(shown.dtype))
            shown = torch.where(second[..., None], noised, shown)
        states = plans.run(sheets, shown, draws.masked)
        sums = plans.weigh(sheets, states, features, draws.masked, draws.flow)
        dit = sums.new_zeros(self._clips.batch_size)
        if self.renders:
            told = tell_all(sheets, draws.masked, second, no_text=text, no_plan=plan)
            dit = self._render(rows, draws, states.penultimate, told)
        rendered = torch.full_like(dit, len(self.renders))
        both = pad(torch.stack([dit, rendered], dim=1), (0, 0, 0, len(rows) - len(dit)))
        return torch.cat([sums, both], dim=1)

    def _render(self, rows: Tensor, draws: CoDraws, hidden: Tensor, told: Tensor) -> Tensor:
        """Losses of the samples with clips, summed over experts."""
        count = self._clips.batch_size
        own, coins = rows[:count], draws.coins[:count]
        made = self.plans.planner.connector.for_gen(hidden[:count]).float().split(list(self._clips.counts))
        read = told[:count].split(list(self._clips.counts))
        texts = self._passes[0].texts(own, coins[:, COINS.index("text")])
        parts = list(zip(texts, made, read, self._told_rows, strict=True))
        contexts = [torch.cat([text, states[:, :end]], dim=1) for text, states, _, end in parts]
        seen = [torch.cat([text.any(-1), some[:, :end]], dim=1) for text, _, some, end in parts]  # zeros fill texts
        sources = coins[:, COINS.index("image") : COINS.index("video") + 1] if self._drops_sources else None
        found = [
            render.measure(own, noises, contexts, seen, sources)
            for render, noises in zip(self._passes, draws.noises, strict=True)
        ]
        return torch.stack(found).sum(0)

    @property
    def _passes(self) -> list[StackedPass]:
        return cast(list[StackedPass], list(self.renders))

    def _longest(self, numbers: Tensor) -> int:
        """Tokens of the longest sequence that the planner reads of some samples."""
        plans = self._bank.plans
        lengths = plans.length[plans.variants[numbers].long()].amax(1)
        return int((lengths + plans.count[numbers] * self._beside).max())


def _trimmed(stack: Stack) -> Stack:
    """A stack without the rows that fill every text."""
    rows = max(int(x.any(-1).sum(-1).max()) for x in (stack.text, stack.dropped))
    return replace(stack, text=stack.text[:, :rows], dropped=stack.dropped[:rows])

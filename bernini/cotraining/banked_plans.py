"""Plans of a batch from a bank in fixed shapes: what `bernini.planner.planning.Planner` makes of single samples."""

from typing import NamedTuple

import torch
from torch import Tensor

from bernini.planner.bank import COINS
from bernini.planner.banked import PlanPass, take
from bernini.planner.flow_head import guidance_weights
from bernini.planner.planning import PlanningConfig
from bernini.planner.reveal import reveal_counts

LOSES = {"cond": (), "imgcond": ("image", "video"), "uncond": COINS}
"""What the streams of planning leave out, beside what the sample has lost."""


class PlanDraws(NamedTuple):
    """What is drawn for plans.

    Attributes:
        rank: ``[B, N]`` how many target tokens of the sample are revealed before each, in an order by which step they
            are.
        noise: ``[B, N, D]`` of each token.
    """

    rank: Tensor
    noise: Tensor


class BankedPlans:
    """Plans samples of a bank, revealing in random order.

    Args:
        plans: The planner's pass.
        config: How to plan; order, cache and graphs are not looked at.
        tokens: Most target tokens of a sample.
        device: Where to compute.
    """

    def __init__(self, plans: PlanPass, config: PlanningConfig, tokens: int, device: torch.device) -> None:
        self._plans, self._config = plans, config
        counts = [[0] * config.steps] + [reveal_counts(n, config.steps) for n in range(1, tokens + 1)]
        self._ends = torch.tensor(counts, device=device).cumsum(1)  # tokens revealed by the end of each step
        names = guidance_weights(config.txt, config.img)
        self._loses = {name: torch.tensor([c in LOSES[name] for c in COINS], device=device) for name in names}

    @torch.no_grad()
    def __call__(self, numbers: Tensor, lost: Tensor, features: Tensor, draws: PlanDraws) -> Tensor:
        """Plan.

        Args:
            numbers: ``[B]`` samples.
            lost: Bool ``[B, 3]``, which of `COINS` they have lost.
            features: ``[B, tokens, D]`` ViT embeddings of their frames; those of targets are not looked at.
            draws: Order and noise.

        Returns:
            ``[B, N, D]`` fp32; any beyond a sample's target tokens.
        """
        plans, config = self._plans, self._config
        connector, head = plans.planner.connector, plans.planner.vit_decoder
        streams = {name: plans.sheets(numbers, plans.variant(numbers, lost | own)) for name, own in self._loses.items()}
        count = next(iter(streams.values())).count
        ends = torch.nn.functional.pad(self._ends[count], (1, 0))[..., None]
        values = torch.zeros_like(draws.noise)
        for step in range(config.steps):
            hidden = (draws.rank >= ends[:, step]) & (draws.rank < count[:, None])
            conditions = {}
            for name, sheets in streams.items():
                targets = sheets.targets[..., None].expand_as(values)
                shown = take(features, sheets.shows)
                states = plans.run(sheets, shown.scatter(1, targets, values.to(shown.dtype)), hidden)
                conditions[name] = connector.for_vit(take(states.penultimate, sheets.targets)).flatten(0, 1)
            drawn = head.sample(conditions, draws.noise.flatten(0, 1), config.flow_steps, config.txt, config.img)
            revealed = hidden & (draws.rank < ends[:, step + 1])
            values = torch.where(revealed[..., None], drawn.view_as(values), values)
        return values

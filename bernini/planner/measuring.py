"""Plans of a module while it trains: made by its planner, measured in validation."""

import math
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from bernini.conversation import Batch, Conversation
from bernini.measuring import Measured
from bernini.planner.conversations import ConversationPlanner
from bernini.planner.flow_head import CHUNK
from bernini.planner.model import PlannerModel
from bernini.planner.planning import Plan, PlanningConfig
from bernini.planner.template import PlannerTemplate
from bernini.planner.validation import PlanMeter, PlanValidation, true_target
from bernini.planner.vision import TargetSize
from bernini.reasoning import unfold
from bernini.seeds import draw_seed
from bernini.sharding import shard, weights_mesh
from bernini.ulysses import Axis


class PlansMeasured(Measured):
    """A module with a planner, whose plans validation measures beside its losses.

    Attributes:
        planner: The planner.
        template: Writes conversations for it.
        planning: How `plan` plans.
        validation: Plans in validation.
        plans: What the running validation has planned; null outside of one, or if it plans nothing.
    """

    planner: PlannerModel
    template: PlannerTemplate
    planning: PlanningConfig
    validation: PlanValidation
    plans: PlanMeter | None = None

    def prepare_planner(self, recompute: bool) -> None:
        """Make the planner ready to be trained; shard it over the mesh if the strategy brings one.

        Args:
            recompute: Recompute layers in the backward pass.
        """
        head = self.planner.vit_decoder
        if recompute:
            self.planner.mllm.gradient_checkpointing_enable()
            head.net.gradient_checkpointing = self.device_mesh is not None
        head.config.chunk = CHUNK  # sharded, it goes without and recomputes instead
        if self.device_mesh is not None:
            shard(self.planner, self.planner.blocks, weights_mesh(self))
            text = self.planner.text.config
            self.planner.axis = Axis.of(self.device_mesh, text.num_key_value_heads or text.num_attention_heads)
            if self.validation.samples:
                rank_zero_warn("a sharded planner cannot plan: validation measures losses alone")

    def on_validation_epoch_start(self) -> None:
        """Begin to gather losses and plans."""
        super().on_validation_epoch_start()
        if self.validation.samples and self.device_mesh is None:
            share = math.ceil(self.validation.samples / self.trainer.world_size)
            width = self.planner.embedding.embedding_dim
            self.plans = PlanMeter(share, width, self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The losses, and plans of the first samples, under randomness that is the same at every validation."""
        super().validation_step(batch, batch_idx)
        if self.plans and (chosen := self.plans.choose([part for s in batch.samples for part in unfold(s)])):
            made = self.plan(chosen, [draw_seed(self.seed, "plan", s.key) % 2**32 for s in chosen])
            visuals = [true_target(s, self.template.vision) for s in chosen]
            self.plans.add(chosen, [plan.embeds for plan in made], visuals, self.planner.see(visuals))

    def _found(self) -> dict[str, Tensor]:
        """Losses and quality of plans."""
        plans, self.plans = self.plans, None
        return {**super()._found(), **(plans.compute(self.trainer.strategy) if plans else {})}

    @torch.no_grad()
    def plan(
        self,
        conversations: Sequence[Conversation],
        seeds: Sequence[int],
        sizes: Sequence[TargetSize | None] | None = None,
        config: PlanningConfig | None = None,
        negative: str = "",
    ) -> list[Plan]:
        """Plan the targets of conversations; what known ones show is not looked at.

        Args:
            conversations: What to plan.
            seeds: Seed of each plan's order and noise.
            sizes: Size of each target that nothing else gives one.
            config: How to plan; as `planning` says if null.
            negative: What the stream without a condition says.
        """
        was_training = self.planner.training
        self.planner.eval()
        planner = ConversationPlanner(self.planner, self.template)
        unknown: list[TargetSize | None] = [None] * len(conversations)
        plans = planner(conversations, seeds, config or self.planning, sizes or unknown, negative)
        self.planner.train(was_training)
        return plans

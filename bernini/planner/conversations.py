"""A planner as its folder holds it: weights, and the words and numbers that go with them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from transformers import AutoTokenizer

from bernini.conversation import Conversation
from bernini.errors import CheckpointError
from bernini.planner.cot import WritingConfig, rewrite
from bernini.planner.model import MLLM, PlannerConfig, PlannerModel, load_planner, save_planner
from bernini.planner.planning import Plan, PlanningConfig, PlanRequest
from bernini.planner.settings import PlannerSettings
from bernini.planner.template import PlannerTemplate
from bernini.planner.vision import TargetSize


class ConversationPlanner(nn.Module):
    """Plans the targets of conversations, and rewrites their prompts.

    Args:
        model: The planner.
        template: Writes conversations as it reads them.
    """

    def __init__(self, model: PlannerModel, template: PlannerTemplate) -> None:
        super().__init__()
        self.model, self.template = model, template
        self._planner = model.planner()

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "ConversationPlanner":
        """Read what `callbacks.SavePlanner` wrote, or the planner of a released folder.

        Args:
            folder: Folder with ``bernini/`` and ``mllm/``.
            dtype: Dtype of the weights.

        Raises:
            CheckpointError: It is no planner's folder.
        """
        root = Path(folder)
        settings = PlannerSettings.of(root)
        model = load_planner(root, dtype, PlannerConfig(flow_shift=settings.flow_shift))
        if not (root / MLLM / "tokenizer_config.json").is_file():
            raise CheckpointError(
                "no tokenizer of a planner here",
                where=str(root / MLLM / "tokenizer_config.json"),
                fix="point at a folder with bernini/ and mllm/, the latter with Qwen2.5-VL's tokenizer",
            )
        tokenizer = AutoTokenizer.from_pretrained(root / MLLM, local_files_only=True)
        return cls(model, PlannerTemplate(tokenizer, settings.vision))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``bernini/`` and ``mllm/``."""
        write_planner(self.model, self.template, Path(folder))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.mask_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.model.mask_tokens.dtype

    @torch.no_grad()
    def forward(
        self,
        conversations: Sequence[Conversation],
        seeds: Sequence[int],
        config: PlanningConfig,
        sizes: Sequence[TargetSize | None],
        negative: str = "",
    ) -> list[Plan]:
        """Plan each target; what known ones show is not looked at.

        Args:
            conversations: What to plan.
            seeds: Seed of each plan's order and noise.
            config: How to plan.
            sizes: Size of each target that nothing else gives one.
            negative: What the stream without a condition says.

        Raises:
            DataError: A visual has no pixels or no size, or there are too many visuals or tokens of text.
        """
        return self._planner.plan(self._requests(conversations, seeds, sizes, negative), config)

    @torch.no_grad()
    def adopt(
        self,
        conversations: Sequence[Conversation],
        embeds: Sequence[Tensor],
        sizes: Sequence[TargetSize | None],
        negative: str = "",
    ) -> list[Plan]:
        """Plans that show given embeddings, such as the true ones of a target.

        Args:
            conversations: What they are plans of.
            embeds: ``[N, D]`` ViT embeddings of each.
            sizes: As for planning.
            negative: Likewise.

        Raises:
            DataError: As in planning, or embeddings are not those of so many tokens.
        """
        seeds = [0] * len(conversations)  # nothing is drawn
        return self._planner.adopt(self._requests(conversations, seeds, sizes, negative), embeds)

    @apply_forward_hook  # comes to the device when it is offloaded, as for planning
    def rewrite(
        self, conversations: Sequence[Conversation], config: WritingConfig, seeds: Sequence[int]
    ) -> list[Conversation]:
        """Reason about instructions, and put what it comes to in their place: `bernini.planner.cot.rewrite`."""
        return rewrite(self.model, self.template, conversations, config, seeds)

    def _requests(
        self,
        conversations: Sequence[Conversation],
        seeds: Sequence[int],
        sizes: Sequence[TargetSize | None],
        negative: str,
    ) -> list[PlanRequest]:
        asked = zip(conversations, sizes, strict=True)
        return self.model.requests([self.template.streams(one, negative, size) for one, size in asked], seeds)


def write_planner(
    model: PlannerModel,
    template: PlannerTemplate,
    folder: Path,
    dtype: torch.dtype | None = None,
    write: bool = True,
) -> None:
    """Write a planner with its configuration, settings and tokenizer: all that `ConversationPlanner` reads.

    Args:
        model: The planner.
        template: What writes for it.
        folder: The folder.
        dtype: Dtype on disk; the weights' own if null.
        write: Whether this rank writes; with sharded weights every rank has to call.
    """
    save_planner(model, folder, dtype, write)
    if write:
        PlannerSettings(model.config.flow_shift, template.vision).save(folder)
        template.tokenizer.save_pretrained(folder / MLLM)

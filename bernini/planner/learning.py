"""What a planner learns from samples: which target tokens are hidden, noises for them, and losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bernini.conversation import Conversation
from bernini.means import MeanTable, mean_over_ranks
from bernini.planner.flow_head import Draws, FlowHead
from bernini.planner.masking import MASK_RATIOS, TARGET, UNIFORM, draw_masked
from bernini.planner.model import PlannerOutput
from bernini.planner.template import IGNORED, PlannerSample
from bernini.planner.validation import right_tokens
from bernini.tasks import TASKS, UNDERSTANDING

NAMES = ["visual", "ntp", "accuracy", "answers", "thoughts", *(f"visual_{task}" for task in TASKS)]
"""What `weigh` measures."""

Ratios = Literal["beta", "uniform"]


@dataclass
class LossConfig:
    """Weights of the losses (paper, eq. 3) and what is hidden.

    Attributes:
        ntp: Weight of the next-token loss.
        visual: Weight of the flow head's loss on hidden target tokens; at 0, what serves it alone is frozen.
        ratios: Share of a target that is hidden: each task's own Beta distribution (paper, table 3), or uniform.
    """

    ntp: float = 0.2
    visual: float = 1.0
    ratios: Ratios = "beta"


def hide(sample: Conversation, written: PlannerSample, ratios: Ratios, generator: torch.Generator) -> Tensor:
    """Draw which target tokens of a sample are hidden: bool ``[n]`` on the CPU, at least one of a target.

    Args:
        sample: The sample.
        written: Its tokens.
        ratios: See `LossConfig`.
        generator: On the CPU.
    """
    masked = written.token_type == TARGET
    if sample.targets:
        ratio = MASK_RATIOS.get(sample.task, UNIFORM) if ratios == "beta" else UNIFORM
        masked[masked.clone()] = draw_masked(int(masked.sum()), ratio, generator)
    return masked


def draw_noises(head: FlowHead, masked: Sequence[Tensor], generators: Sequence[torch.Generator]) -> Draws:
    """Timesteps and noises of the hidden tokens of samples, each from its own generator."""
    return Draws.cat([head.draw(int(m.sum()), g, g.device) for m, g in zip(masked, generators, strict=True)])


def labels(written: PlannerSample) -> int:
    """How many tokens are learned."""
    return int((written.labels != IGNORED).sum())


def weigh(
    output: PlannerOutput,
    samples: Sequence[Conversation],
    hidden: Sequence[int],
    labelled: Sequence[int],
    table: MeanTable,
) -> tuple[Tensor, Tensor]:
    """The losses of a pack of samples; with several ranks all have to call.

    Args:
        output: Of the pack.
        samples: The samples.
        hidden: Hidden tokens of each.
        labelled: Labels of each.
        table: Is given the sums of `NAMES`; without a visual loss those of text alone.

    Returns:
        The next-token loss, mean over all labels, and the visual one, over all hidden tokens; 0 if it was not asked
        for. Their means over ranks are those of all ranks' samples.
    """
    ntp = F.cross_entropy(output.logits.float(), output.labels, reduction="none")
    visual = ntp.new_zeros(sum(hidden)) if output.visual is None else output.visual
    counts = mean_over_ranks([sum(labelled), sum(hidden)], ntp.device)
    ntp_mean, visual_mean = torch.stack([ntp.sum(), visual.sum()]) / counts.clamp(min=1e-6)
    right = right_tokens(output, labelled)
    measured: list[tuple[Sequence[Tensor], Sequence[tuple[str, ...]]]] = [
        (ntp.detach().split(list(labelled)), [("ntp",)] * len(samples)),
        (right, [("accuracy",)] * len(samples)),
        ([own.all().expand(min(len(own), 1)) for own in right], [(whole_text(s.task),) for s in samples]),
    ]
    if output.visual is not None:
        rows = [("visual", f"visual_{s.task}") if s.targets else () for s in samples]
        measured.insert(0, (visual.detach().split(list(hidden)), rows))
    for parts, names in measured:
        sums = torch.stack([own.sum(dtype=torch.float32) for own in parts])
        counted = [counts_for(s, *own) for s, own in zip(samples, names, strict=True)]
        table.add(sums, counted, [len(part) for part in parts])
    return ntp_mean, visual_mean


def whole_text(task: str) -> str:
    """Under which name texts of a task are counted that are right from end to end."""
    return "answers" if task in UNDERSTANDING else "thoughts"


def counts_for(sample: Conversation, *rows: str) -> tuple[str, ...]:
    """The rows that a sample's values belong to: none if it only keeps a rank in step with the others."""
    return () if sample.info.get("padding") else rows


def with_sum(means: dict[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Means of losses, and ``loss``, the weighted sum of those that are there."""
    parts = [weight * means[name] for name, weight in weights.items() if name in means]
    return {"loss": torch.stack(parts).sum(), **means} if parts else means

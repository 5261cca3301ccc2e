"""A sample as planner and renderer learn from it together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bernini.conversation import Conversation
from bernini.cotraining.conditions import ConditionDropout, everything
from bernini.cotraining.exposure import PlanExposure, PlanKind, lay_beside
from bernini.flow.guidance import Context
from bernini.planner.learning import Ratios, hide
from bernini.planner.masking import TARGET
from bernini.planner.template import PlannerSample, PlannerTemplate


@dataclass(frozen=True)
class Example:
    """A sample, written, with what is hidden of it and what the renderer is told.

    Attributes:
        planner: What the planner reads.
        renderer: Text and sources of the renderer; null where there is nothing to render.
        written: The planner's tokens, with a second target that shows the plan unless that is ``visible``.
        masked: Bool ``[n]``, target tokens that are hidden and that the flow head learns.
        second: Bool ``[n]``, tokens of the second target.
        told: Bool ``[n]``, tokens whose states the renderer reads.
        kind: Which plan it is.
        level: How far the second target is from the true embeddings, 0, to noise or to what is planned, 1.
    """

    planner: Conversation
    renderer: Conversation | None
    written: PlannerSample
    masked: Tensor
    second: Tensor
    told: Tensor
    kind: PlanKind = "visible"
    level: float = 0.0


def make_example(
    sample: Conversation,
    template: PlannerTemplate,
    ratios: Ratios,
    generator: torch.Generator,
    dropout: ConditionDropout | None = None,
    exposure: PlanExposure | None = None,
) -> Example:
    """Draw conditions, what is hidden and which plan the renderer reads.

    Args:
        sample: A conversation with a visual target, or a text to learn.
        template: Writes it.
        ratios: See `bernini.planner.learning.LossConfig`.
        generator: On the CPU.
        dropout: How conditions are dropped; not at all if null.
        exposure: Which plan the renderer reads; the visible target tokens if null.

    Raises:
        DataError: The sample is not one of its task, or cannot be written.
    """
    if not sample.targets:
        written = template(sample)
        nowhere = torch.zeros(len(written), dtype=torch.bool)
        return Example(sample, None, written, nowhere, nowhere, nowhere)
    sample = sample.check()
    kept = dropout.draw(sample, generator) if dropout else everything(sample)
    written = template(kept.planner)
    masked = hide(kept.planner, written, ratios, generator)
    kind, level = exposure.draw(generator) if exposure else ("visible", 0.0)
    second = torch.zeros(len(written), dtype=torch.bool)
    if kind != "visible" and kept.context.plan:
        first = masked
        written, second = lay_beside(written)
        masked = torch.zeros_like(second)
        masked[~second] = first
    told = told_tokens(written.token_type, masked, second, kept.context)
    level = {"full": 0.0, "planned": 1.0}.get(kind, level)
    return Example(kept.planner, kept.renderer, written, masked, second, told, kind, level)


def told_tokens(token_type: Tensor, masked: Tensor, second: Tensor, context: Context) -> Tensor:
    """Bool ``[n]``, tokens whose states are the planner's rows of a context of guidance.

    Args:
        token_type: ``[n]``.
        masked: Bool ``[n]``, hidden target tokens: the renderer never reads them.
        second: Bool ``[n]``, tokens of a second target, which is then read in place of the first.
        context: Which context: text and sources, with a plan the target, and that alone beside a negative text.
    """
    target = token_type == TARGET
    plan = second if second.any() else target & ~masked
    if not context.plan:
        return ~target
    return plan if context.text == "negative" else plan | ~target

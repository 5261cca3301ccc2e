"""What the full model's renderer reads beside its sources: rows of text, then rows of the planner, in one sequence."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from bernini.errors import ConfigError
from bernini.flow.guidance import Context
from bernini.planner.planning import Plan


def check_widths(planner: int, renderer: int) -> None:
    """Compare the rows of a planner's connector with the text features of a renderer.

    Raises:
        ConfigError: They differ in width.
    """
    if planner != renderer:
        raise ConfigError(
            "the planner and the renderer do not fit",
            why=f"the planner's connector makes rows of {planner} channels, the renderer takes {renderer}",
            fix="use parts of one family; a planner from scratch needs planner.gen_dim as wide as the text features",
        )


def join_context(text: Tensor, rows: Tensor, at_least: int = 0) -> Tensor:
    """Put a text and rows of the planner into one context.

    Both are embedded by the transformer's own text embedder; there is no layer in between (released
    ``t5_combine_type: concat_with_zero_init``).

    Args:
        text: ``[n, C]`` features of the text at its real length, the end token included, without padding.
        rows: ``[m, C]`` rows of the connector's ``for_gen``.
        at_least: Rows of the result, filled up with zeros, which are attended: 512 in released inference, 0 in
            training. What is longer stays so.

    Returns:
        ``[max(n + m, at_least), C]`` fp32.

    Raises:
        ConfigError: Text and planner differ in width.
    """
    check_widths(rows.shape[-1], text.shape[-1])
    joined = torch.cat([text.float(), rows.float()])
    return pad(joined, (0, 0, 0, max(0, at_least - len(joined))))


def planned_contexts(plan: Plan, positive: Tensor, negative: Tensor, at_least: int = 0) -> dict[Context, Tensor]:
    """The contexts of all arms of the full model.

    Args:
        plan: What the planner made.
        positive: ``[n, C]`` text features of the prompt at their real length.
        negative: ``[m, C]`` those of the negative prompt.
        at_least: As for `join_context`.

    Returns:
        ``[rows, C]`` fp32 of each context. Without the plan there are still rows of the planner: those of the prompt
        and the sources, or of the negative prompt.

    Raises:
        ConfigError: Text and planner differ in width.
    """
    rows = {
        Context("positive", plan=True): (positive, plan.wtxt_wvit),
        Context("positive", plan=False): (positive, plan.wtxt_wovit),
        Context("negative", plan=True): (negative, plan.wotxt_wvit),
        Context("negative", plan=False): (negative, plan.wotxt_wovit),
    }
    return {context: join_context(text, own, at_least) for context, (text, own) in rows.items()}

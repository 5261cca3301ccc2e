"""Second targets and told tokens of batches, in fixed shapes: what `lay_beside` and `told_tokens` do for one sample."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bernini.planner.banked import Sheets
from bernini.planner.masking import TARGET


class SecondTargets(NamedTuple):
    """Where second targets lie.

    Attributes:
        second: Bool ``[B, L]``, their tokens.
        number: ``[B, L]`` which of the target's tokens each of them is; any where there is none.
    """

    second: Tensor
    number: Tensor


def lay_all_beside(sheets: Sheets, chosen: Tensor) -> tuple[Sheets, SecondTargets]:
    """Lay targets of a batch beside themselves, as `bernini.cotraining.exposure.lay_beside` does.

    Args:
        sheets: B samples of L tokens, with at most N target tokens.
        chosen: Bool ``[B]``, whose targets.

    Returns:
        The samples, L + N tokens, and where the second targets are.
    """
    most = sheets.targets.shape[1]
    extra = torch.where(chosen, sheets.count, 0)[:, None]
    end = sheets.targets.gather(1, (sheets.count - 1).clamp(min=0)[:, None]) + 1
    place = torch.arange(sheets.ids.shape[1] + most, device=chosen.device)
    beyond = place - end
    number = beyond.clamp(0, most - 1)
    second = (beyond >= 0) & (beyond < extra)
    behind = torch.where(beyond < 0, place, place - extra)
    origin = torch.where(second, sheets.targets.gather(1, number), behind).clamp(max=sheets.ids.shape[1] - 1)
    length = sheets.length + extra[:, 0]
    laid = replace(
        sheets,
        ids=sheets.ids.gather(1, origin),
        token_type=sheets.token_type.gather(1, origin) * (place < length[:, None]),  # what fills is text
        segment_id=sheets.segment_id.gather(1, origin) + second,
        position_ids=sheets.position_ids.gather(1, origin[..., None].expand(-1, -1, 3)),
        shows=sheets.shows.gather(1, origin),
        length=length,
        labelled=torch.where(sheets.labelled >= end, sheets.labelled + extra, sheets.labelled),
    )
    return laid, SecondTargets(second, number)


def tell_all(sheets: Sheets, masked: Tensor, second: Tensor | None, no_text: Tensor, no_plan: Tensor) -> Tensor:
    """Which tokens' states the renderer reads, as `bernini.cotraining.examples.told_tokens` says: bool ``[B, L]``.

    Args:
        sheets: The samples.
        masked: Bool ``[B, N]``, target tokens that are hidden.
        second: Bool ``[B, L]``, tokens of second targets; null without any.
        no_text: Bool ``[B]``, samples whose renderer lost its text.
        no_plan: Bool ``[B]``, those that lost the rows of the target.
    """
    target = sheets.token_type == TARGET
    plan = target & ~sheets.hidden(masked)
    if second is not None:
        plan = torch.where(second.any(1, keepdim=True), second, plan)
    others = ~target & (torch.arange(target.shape[1], device=target.device) < sheets.length[:, None])
    return (plan & ~no_plan[:, None]) | (others & ~(no_text & ~no_plan)[:, None])

"""Which plan the renderer is trained on: the visible target tokens of the paper, or one more like those of inference.

In the paper's recipe the renderer reads the true embeddings of the few target tokens that are not hidden from the flow
head. At inference it reads a whole plan that was predicted. Any other plan than the paper's is laid beside the target
in the planner's sequence, as a second target: it sees text and sources, nobody but itself sees it, and the one forward
of the multimodal LLM serves both.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor

from bernini.errors import ConfigError
from bernini.planner.masking import SOURCE, TARGET
from bernini.planner.planning import PlanningConfig
from bernini.planner.template import IGNORED, PlannerSample

PlanKind = Literal["visible", "full", "planned", "noised"]
KINDS: tuple[PlanKind, ...] = ("visible", "full", "planned", "noised")


@dataclass
class PlanExposure:
    """Shares of training samples by the plan that the renderer reads; they add up to 1.

    Attributes:
        visible: The true embeddings of the target tokens that are not hidden (the paper's).
        full: Those of all target tokens.
        planned: What the planner, as it is, plans for the sample.
        noised: Those of all target tokens under noise.
        level: Largest sigma of that noise; each sample's is drawn uniformly below it.
        planning: How the planner plans them.
    """

    visible: float = 1.0
    full: float = 0.0
    planned: float = 0.0
    noised: float = 0.0
    level: float = 0.5
    planning: PlanningConfig = field(
        default_factory=lambda: PlanningConfig(steps=4, flow_steps=1, cuda_graphs=False)  # graphs would not be reused
    )

    def __post_init__(self) -> None:
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ConfigError(
                f"shares of {dict(zip(KINDS, self.shares, strict=True))}",
                where="model.init_args.exposure",
                why="they are at least 0 and add up to 1",
                fix="lower visible by what is given to the others",
            )
        if not 0 <= self.level <= 1:
            raise ConfigError(f"exposure.level is {self.level}", why="a sigma lies between 0 and 1")

    @property
    def shares(self) -> list[float]:
        """Share of each of `KINDS`."""
        return [getattr(self, kind) for kind in KINDS]

    def draw(self, generator: torch.Generator) -> tuple[PlanKind, float]:
        """Draw which plan a sample has, and the sigma of its noise.

        Args:
            generator: On the CPU; it is drawn from once, whatever comes out.
        """
        which, level = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        ends = torch.tensor(self.shares, dtype=torch.float64).cumsum(0)
        return KINDS[int((ends <= which * ends[-1]).sum())], level * self.level


def lay_beside(written: PlannerSample) -> tuple[PlannerSample, Tensor]:
    """A sequence with its target a second time, under another number and at the same positions.

    Args:
        written: A sample with a known target.

    Returns:
        The sequence, n + N tokens, and which of them are the second target, bool ``[n + N]``.
    """
    target = torch.nonzero(written.token_type == TARGET).squeeze(1)
    end = int(target[-1]) + 1
    order = torch.cat([torch.arange(end), target, torch.arange(end, len(written))])
    second = torch.zeros(len(order), dtype=torch.bool)
    second[end : end + len(target)] = True
    before = written.segment_id[:end][written.token_type[:end] == SOURCE].unique().numel()  # sources before the target
    tensors = {f.name: getattr(written, f.name) for f in fields(written) if f.type is Tensor}
    again = {name: x[..., order] for name, x in tensors.items()}
    again["segment_id"][second] += 1  # among targets, of which there is one
    again["labels"][second] = IGNORED
    visuals = [*written.visuals[: before + 1], written.visuals[before], *written.visuals[before + 1 :]]
    return replace(written, **again, visuals=visuals), second

"""Plans in validation: which samples are planned, how good the plans are, and what they look like."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from bernini.conversation import Conversation
from bernini.errors import ConfigError, DataError
from bernini.means import MeanTable
from bernini.planner.model import PlannerOutput
from bernini.planner.picture import lay_out, one_above_other, plan_picture, token_patches
from bernini.planner.quality import PlanExplainedVariance, PlanRetrieval, cosines
from bernini.planner.vision import Grid, VisionConfig, Visual, look_at
from bernini.tasks import TASKS


@dataclass
class PlanValidation:
    """Plans in validation.

    Attributes:
        samples: Most validation samples that are planned, over all ranks: the first ones with a target. 0 for none.
    """

    samples: int = 32

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ConfigError(f"validation.samples is {self.samples}", why="it is at least 0", fix="0 plans nothing")


@dataclass(frozen=True)
class PlanPicture:
    """A plan to look at.

    Attributes:
        key: The sample's.
        task: The sample's.
        prompt: What was asked for.
        pixels: ``[3, 1, H, W]`` uint8: frames of the true target, the first of each pair, and the plan below them.
    """

    key: str
    task: str
    prompt: str
    pixels: Tensor


@dataclass(frozen=True)
class _Planned:
    """A plan, what is true, and the pixels of its tokens."""

    sample: Conversation
    grid: Grid
    embeds: Tensor
    true: Tensor
    visual: Visual


class PlanMeter:
    """Measures plans of validation samples against the true embeddings of their targets, and keeps them for pictures.

    With several ranks, every one of them has to compute.

    Args:
        samples: How many samples this rank plans.
        dim: Width of the embeddings.
        device: Where the metrics are.
    """

    def __init__(self, samples: int, dim: int, device: torch.device) -> None:
        self._left = samples
        self._cosines = MeanTable(["cosine", *(f"cosine_{task}" for task in TASKS)], device)
        self._variance, self._retrieval = PlanExplainedVariance(dim).to(device), PlanRetrieval().to(device)
        self._planned: list[_Planned] = []

    def choose(self, samples: Sequence[Conversation]) -> list[Conversation]:
        """Those of a batch that are to be planned: the first with a target, as many as are left."""
        chosen = [s for s in samples if s.targets and not s.info.get("padding")][: self._left]
        self._left -= len(chosen)
        return chosen

    def add(
        self, samples: Sequence[Conversation], plans: Sequence[Tensor], visuals: Sequence[Visual], true: Tensor
    ) -> None:
        """Measure plans.

        Args:
            samples: What was planned.
            plans: ``[N, D]`` of each.
            visuals: Patches of their true targets.
            true: ``[tokens, D]`` true embeddings of all of them, one after the other.
        """
        grids = [token_grid(visual) for visual in visuals]
        planned = torch.cat(list(plans))
        self._variance.update(planned, true)
        self._retrieval.update(planned, true, grids)
        lengths = [visual.tokens for visual in visuals]
        sums = torch.stack([own.sum() for own in cosines(planned, true).split(lengths)])
        self._cosines.add(sums, [("cosine", f"cosine_{sample.task}") for sample in samples], lengths)
        for sample, plan, visual, grid, truth in zip(samples, plans, visuals, grids, true.split(lengths), strict=True):
            self._planned.append(_Planned(sample, grid, plan, truth, visual))

    def compute(self, strategy: Strategy) -> dict[str, Tensor]:
        """What was measured on all ranks of a strategy, by name; nothing without plans.

        ``plan_cosine``, also by task, ``plan_explained_variance``, ``plan_retrieval@1`` and ``@5``, and
        ``plan_gallery``, the mean number of targets that a plan's own had to be told from, itself included.
        """
        found = self._cosines.over_ranks(strategy).means()
        if found:
            found |= {"explained_variance": self._variance.compute(), **self._retrieval.compute()}
        return {f"plan_{name}": value for name, value in found.items()}

    def pictures(self, count: int) -> Iterator[PlanPicture]:
        """This rank's first plans as pictures; the gallery holds the true targets of all its plans, their own too.

        Targets of which features alone were prepared have no pixels to show.
        """
        shown = [one for one in self._planned if one.visual.patches is not None]
        if not shown:
            return
        own = [token_patches(one.visual) for one in shown]
        gallery, patches = torch.cat([one.true for one in shown]), torch.cat(own)
        for one, frames in zip(shown[:count], own, strict=False):
            rows = lay_out(frames, one.grid), plan_picture(one.embeds, one.grid, gallery, patches)
            yield PlanPicture(one.sample.key, one.sample.task, one.sample.prompt, one_above_other(rows))


def token_grid(visual: Visual) -> Grid:
    """``(t, h, w)`` in tokens."""
    t, h, w = visual.grid
    return t, h // visual.config.merge, w // visual.config.merge


def true_target(conversation: Conversation, config: VisionConfig) -> Visual:
    """What is to be planned, as the vision tower takes it.

    Raises:
        DataError: It is not known.
    """
    visual = look_at(conversation.targets[0], config, conversation.key)
    if visual is None:
        raise DataError("a plan cannot be measured without its true target", where=conversation.key)
    return visual


def right_tokens(output: PlannerOutput, labelled: Sequence[int]) -> list[Tensor]:
    """Which tokens of each sample's answer the model would say, given those before them.

    If it is all of them, greedy decoding gives exactly this answer, and only then.

    Args:
        output: Of a pack of samples.
        labelled: Labels of each sample.

    Returns:
        Bool ``[labels]`` for each sample.
    """
    return list((output.logits.argmax(-1) == output.labels).split(list(labelled)))

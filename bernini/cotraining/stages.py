"""What is trained when: stages as data, and the parts of the model that they name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from bernini.errors import ConfigError
from bernini.planner.model import PlannerModel
from bernini.renderer.experts import Choice, Experts

Part = Literal[
    "connector_gen",
    "connector_vit",
    "flow_head",
    "mask_token",
    "mllm",
    "vit",
    "renderer",
    "renderer_high",
    "renderer_low",
]

RENDERERS = ("renderer", "renderer_high", "renderer_low")
TEACHES: dict[str, frozenset[str]] = {
    "ntp": frozenset({"mllm", "vit"}),
    "visual": frozenset({"connector_vit", "flow_head", "mask_token", "mllm", "vit"}),
    "dit": frozenset({"connector_gen", "mask_token", "mllm", "vit", *RENDERERS}),
}
"""Which parts each loss has gradients for. The renderer's reaches the mask token through visible target tokens, which
see the hidden ones."""


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        train: Parts that are trained; all others are frozen. ``mllm`` is the language model with its embeddings and
            ``lm_head``, ``vit`` the vision tower, ``renderer`` every expert that is there.
        until: Optimizer step at which it ends; null for the last stage, which has no end.
    """

    train: Sequence[Part]
    until: int | None = None


def check_stages(stages: Sequence[Stage], weights: Mapping[str, float]) -> None:
    """Refuse stages that are out of order, or that train what no loss teaches.

    Args:
        stages: The stages.
        weights: Weight of each loss.

    Raises:
        ConfigError: They are not in order, the last one ends or another does not, or a part has no loss.
    """
    ends = [stage.until for stage in stages]
    inner = [end for end in ends[:-1] if end is not None]
    if not stages or ends[-1] is not None or len(inner) < len(ends) - 1 or inner != sorted({*inner}) or 0 in inner:
        raise ConfigError(
            f"stages that end at {ends}",
            where="model.init_args.stages",
            why="each but the last ends at a step of its own, later than those before; the last one has no end",
            fix="stages: [{train: [connector_gen], until: 2000}, {train: [connector_gen, mllm, renderer]}]",
        )
    for stage in stages:
        untaught = [p for p in stage.train if not any(weights[loss] and p in own for loss, own in TEACHES.items())]
        if untaught or not stage.train:
            raise ConfigError(
                f"nothing teaches {' and '.join(untaught)}" if untaught else "a stage that trains nothing",
                where="model.init_args.stages",
                why="the losses that would have weight 0" if untaught else "",
                fix="leave these parts out, or give the loss a weight",
            )


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of the optimizer step after ``step`` ones."""
    return next(stage for stage in stages if stage.until is None or step < stage.until)


def stages_before(stages: Sequence[Stage], step: int) -> list[Stage]:
    """Stages in which any of the first ``step`` optimizer steps was made."""
    starts = [0, *(stage.until for stage in stages[:-1])]
    return [stage for stage, start in zip(stages, starts, strict=True) if start is not None and start < step]


class Parts:
    """The parameters of planner and renderer by part; each belongs to one.

    Args:
        planner: The planner.
        renderer: The renderer.
        expert: Which experts there are; a single one is the part ``renderer``.
    """

    def __init__(self, planner: PlannerModel, renderer: Experts, expert: Choice) -> None:
        tower = {*planner.tower.parameters()}
        self.parameters: dict[str, list[nn.Parameter]] = {
            "connector_gen": [*planner.connector.proj_gen.parameters()],
            "connector_vit": [*planner.connector.pred_vit.parameters()],
            "flow_head": [*planner.vit_decoder.parameters()],
            "mask_token": [planner.mask_tokens],
            "mllm": [p for p in planner.mllm.parameters() if p not in tower],
            "vit": [*planner.tower.parameters()],
        }
        for name, model in renderer.models.items():
            named = {"transformer": "renderer_high", "transformer_2": "renderer_low"}[name]
            self.parameters["renderer" if expert == "single" else named] = [*model.parameters()]

    def expand(self, names: Sequence[Part]) -> set[str]:
        """Parts of some names; ``renderer`` is every expert.

        Raises:
            ConfigError: There is no such expert.
        """
        found = {part for part in self.parameters for name in names if part == name or _is_all(name, part)}
        if absent := [name for name in names if name not in found and name != "renderer"]:
            raise ConfigError(
                f"there is no {' and '.join(absent)} to train",
                where="model.init_args.stages",
                why=f"the parts are {', '.join(self.parameters)}",
                fix="name one of these, or load the expert (model.init_args.expert)",
            )
        return found

    def freeze_all_but(self, learned: set[str]) -> None:
        """Leave gradients to some parts alone; what is frozen keeps none."""
        for part, parameters in self.parameters.items():
            for parameter in parameters:
                parameter.requires_grad_(part in learned)
                if part not in learned:
                    parameter.grad = None


def _is_all(name: str, part: str) -> bool:
    return name == "renderer" and part.startswith("renderer_")


def step_of(checkpoint: str | Path) -> int:
    """Optimizer steps that a checkpoint, a file or a sharded folder, has behind it."""
    path = Path(checkpoint)
    stored = torch.load(path / "meta.pt" if path.is_dir() else path, mmap=True, weights_only=True)
    return int(stored["global_step"])

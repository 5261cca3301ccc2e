"""What trained planners make of the exam: plans in every way that is compared, and answers."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.environment import environment
from benchmarks.quality.plans.exam import ANSWERED, PLANNED, Exam, Sheets
from benchmarks.quality.plans.measuring import Truth, answer, load, measure, plan
from benchmarks.quality.studies import reading_run
from bernini.errors import DataError
from bernini.planner.planning import PlanningConfig
from bernini.planner.reveal import Order

PLANNER = "planner"  # folder of a run that SavePlanner writes
COMPARED = ("t2v", "v2v", "r2v", "v2v/reason")
"""Categories that are planned in all ways; every category is planned in the usual one."""

USUAL = PlanningConfig()
ORDERS: tuple[Order, ...] = ("random", "confidence", "halton")
WAYS: dict[str, dict[str, PlanningConfig]] = {
    "steps": {str(k): replace(USUAL, steps=k) for k in (1, 5, 10, 25, 50)},
    "flow steps": {str(n): replace(USUAL, flow_steps=n) for n in (1, 5, 10)},
    "order": {name: replace(USUAL, order=name) for name in ORDERS},
    "guidance": {"on": USUAL, "off": replace(USUAL, txt=1.0, img=1.0)},
}
"""What is varied, one thing at a time."""


def way(config: PlanningConfig) -> str:
    """Name of a way to plan in the records."""
    return f"{config.order}, {config.steps} x {config.flow_steps}, txt {config.txt:g}, img {config.img:g}"


@dataclass(frozen=True)
class Run:
    """What a run's folder tells of its training.

    Attributes:
        folder: The run's folder, with ``planner/``.
        masks: Distribution of mask ratios, ``beta`` or ``uniform``.
        ntp: Weight of the language loss.
        seed: Of samples, masks and noise.
        recipe: ``steps``, ``batch``, ``lr`` (its peak) and ``samples``.
    """

    folder: Path
    masks: str
    ntp: float
    seed: int
    recipe: dict[str, float]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read ``config.yaml``.

        Raises:
            DataError: It is missing, or of something else.
        """
        with reading_run(folder, "configs/toy/planner.yaml") as config:
            model, data = config["model"]["init_args"], config["data"]["init_args"]
            return cls(
                folder,
                model["loss"]["ratios"],
                model["loss"]["ntp"],
                config["seed_everything"],
                {
                    "steps": config["trainer"]["max_steps"],
                    "batch": data["batch_size"],
                    "lr": model["lr_scheduler"]["init_args"]["max_lr"],
                    "samples": data["length"],
                },
            )

    @property
    def variant(self) -> str:
        """``beta``, ``uniform`` or ``silent``: Beta masks without the language loss."""
        return self.masks if self.ntp else "silent"


class Scorer:
    """Scores planners; those with one vision tower share what it makes of the targets, and the probes.

    Args:
        exam: Held-out samples.
        batch: Samples at once.
        device: Of the models.
        say: Told of progress.
    """

    def __init__(self, exam: Exam, batch: int, device: torch.device, say: Callable[[str], None]) -> None:
        self.exam, self.batch, self.device, self.say = exam, batch, device, say
        self._truth: Truth | None = None

    def before(self, run: Run) -> dict[str, Any]:
        """Answers of a planner that has not learned to plan."""
        model, template = load(run.folder / PLANNER, torch.float32, self.device)
        return self._facts(run) | {"answers": self._answers(model, Sheets(self.exam, template))}

    def after(self, run: Run) -> dict[str, Any]:
        """Plans by way and category, and answers."""
        model, template = load(run.folder / PLANNER, torch.float32, self.device)
        truth = self._truth
        if truth is None or truth.model.tower_print != model.tower_print:
            truth = self._truth = Truth(model, Sheets(self.exam, template), self.batch)
        elif truth.sheets.template.vision != template.vision:
            raise DataError("planners of one tower take pixels in two ways", where=str(run.folder), fix="train alike")
        plans: dict[str, dict[str, Any]] = {}
        for category in PLANNED:
            ways = {way(USUAL): USUAL}
            if category in COMPARED and run.variant != "silent":
                ways |= {way(config): config for values in WAYS.values() for config in values.values()}
            made = plan(model, truth.sheets.planned(category), list(ways.values()), self.batch)
            for name, planned in zip(ways, made, strict=True):
                measured = measure(truth, category, planned)
                plans.setdefault(name, {})[category] = measured.records
                if name == way(USUAL):
                    self.say(f"{run.folder.name}: {category}: retrieval@1 {measured.figures['retrieval@1']:.3f}")
        return self._facts(run) | {"plans": plans, "answers": self._answers(model, truth.sheets)}

    def _answers(self, model: Any, sheets: Sheets) -> dict[str, Any]:
        return {task: answer(model, sheets.asked(task), self.batch) for task in ANSWERED}

    def _facts(self, run: Run) -> dict[str, Any]:
        told = {"variant": run.variant, "seed": run.seed, "recipe": run.recipe}
        return {**told, "exam": asdict(self.exam), "environment": environment()}

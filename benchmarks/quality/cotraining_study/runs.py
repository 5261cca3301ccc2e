"""What the folders of runs tell of their training."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.studies import reading_run
from bernini.cotraining.exposure import KINDS
from bernini.errors import DataError

VARIANTS = {
    "before": "before co-training",
    "paper": "paper's recipe",
    "cold": "no warm-up",
    "full": "whole true plans",
    "noised": "noised plans",
    "planned": "predicted plans",
    "thinking": "with reasoning",
}
STARTS = {"paper": "warmup", "cold": "before", "full": "warmup", "noised": "warmup", "planned": "warmup"}
"""What the runs of a variant go on from, where it is part of what is compared."""

STARTING = ("warmup", *VARIANTS)
"""What a run may go on from in the folder of the study."""


@dataclass(frozen=True)
class Training:
    """How something was trained.

    Attributes:
        name: The folder's.
        start: Name of the run whose planner it went on from.
        whole: Whether from that run's renderer, too.
        banked: Whether from a bank.
        recipe: ``steps``, ``lr`` (its peak), ``tasks``, the parts of the mix, and what the data says of ``batch_size``
            and ``length``, the number of samples.
        exposure: Shares of the plans that the renderer reads, with noised ones the ``level`` of the noise, with
            predicted ones their ``planning``; null for a planner alone.
        seed: Of samples, masks and noise.
    """

    name: str
    start: str
    whole: bool
    banked: bool
    recipe: dict[str, Any]
    exposure: dict[str, Any] | None
    seed: int

    @classmethod
    def read(cls, folder: Path) -> "Training":
        """Read ``config.yaml``.

        Raises:
            DataError: It is missing, or of something else.
        """
        with reading_run(folder, "configs/toy/planner.yaml, warmup.yaml or cotrain.yaml") as config:
            model, data = config["model"]["init_args"], config["data"]["init_args"]
            begun = model["init_from"]
            alone = isinstance(begun, str)
            recipe = {
                "steps": config["trainer"]["max_steps"],
                "lr": model["lr_scheduler"]["init_args"]["max_lr"],
                "tasks": {**data["tasks"]},
                **{name: data[name] for name in ("batch_size", "length") if name in data},
            }
            return cls(
                folder.name,
                Path(begun if alone else begun["planner"]).parent.name,
                not alone and begun["planner"] == begun["renderer"],
                "banked" in config["model"]["class_path"],
                recipe,
                None if alone else _shares(model["exposure"]),
                config["seed_everything"],
            )


@dataclass(frozen=True)
class Run:
    """A run to be scored.

    Attributes:
        variant: One of `VARIANTS`.
        folder: Its folder.
        training: How it was trained.
        start: How what it went on from was trained; null for ``before``, and where that is no run of the study.
    """

    variant: str
    folder: Path
    training: Training
    start: Training | None

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read the folder, and the one beside it that the run went on from.

        Raises:
            DataError: It is no run of the study, or not the one that its name says.
        """
        named = re.fullmatch(rf"({'|'.join(VARIANTS)})-(\d+)", folder.name)
        if named is None:
            raise DataError(
                "the run's name is none of the study's",
                where=str(folder),
                why=f"a name is a variant and a seed; the variants are {', '.join(VARIANTS)}",
                fix="train it into a folder such as runs/cotraining/paper-0",
            )
        training = Training.read(folder)
        begun = re.fullmatch(rf"({'|'.join(STARTING)})-\d+", training.start)
        start = Training.read(folder.parent / training.start) if training.exposure and begun else None
        run = cls(named[1], folder, training, start)
        if training.seed != int(named[2]):
            run._refuse(f"its seed is {training.seed}")
        if (training.exposure is None) != (run.variant == "before"):
            run._refuse("`before` is a planner that was trained alone, and all others are not")
        shown = {kind for kind in KINDS if (training.exposure or {}).get(kind)} - {"visible"}
        if run.variant != "thinking" and shown != {run.variant} & {*KINDS}:
            run._refuse(f"its renderer reads these plans: {training.exposure}")
        if any(task.endswith("/cot") for task in training.recipe["tasks"]) != (run.variant == "thinking"):
            run._refuse("samples with reasoning are what `thinking` has, and no other")
        if training.start.partition("-")[0] != STARTS.get(run.variant, training.start.partition("-")[0]):
            run._refuse(f"it goes on from {training.start}, not from {STARTS[run.variant]}")
        return run

    @property
    def weights(self) -> Path:
        """Folder of the weights: a planner, or planner and renderer."""
        return self.folder / ("planner" if self.variant == "before" else "model")

    def _refuse(self, why: str) -> None:
        raise DataError(
            "the run is not the one that its name says",
            where=str(self.folder),
            why=why,
            fix="train it as the name says, or give it another",
        )


def _shares(exposure: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {kind: exposure[kind] for kind in KINDS}
    if told["noised"]:
        told["level"] = exposure["level"]
    if told["planned"]:
        told["planning"] = {name: exposure["planning"][name] for name in ("steps", "flow_steps", "txt", "img")}
    return told


def hash_weights(folders: Sequence[Path]) -> str:
    """SHA-256 of all weights in folders, so that scores of other weights are told apart."""
    total = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()

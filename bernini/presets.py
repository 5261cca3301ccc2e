"""Settings of making clips, and the presets of the released models.

A setting has one name everywhere: in presets, in a model folder's ``generate.json``, on the command line, in case files
and as an argument of the pipeline.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from bernini.errors import CheckpointError, ConfigError
from bernini.files import replacing
from bernini.flow.guidance import APG, Omegas, get_mode
from bernini.flow.solvers import SolverName
from bernini.planner.cot import WritingConfig
from bernini.planner.planning import PlanningConfig
from bernini.planner.reveal import Order
from bernini.reasoning import Reasoning
from bernini.renderer.sampling import SamplingConfig
from bernini.suggest import closest
from bernini.tasks import TASKS, get_task

PresetName = Literal["r", "v1", "v2"]
FILE = "generate.json"


@dataclass(frozen=True)
class Settings:
    """How an image or a clip is made; the defaults are those of the released command lines.

    Attributes:
        mode: Guidance mode, of those with or those without a plan.
        steps: Solver steps.
        shift: Flow-matching shift of the sigma grid.
        solver: ``unipc`` or ``euler``.
        omega_vid: Weight of source clips.
        omega_img: Weight of sources, or of reference images, as the mode says.
        omega_txt: Weight of the text.
        omega_tgt: Weight of the plan.
        omega_scale: Factor on all of them for the low-noise expert.
        apg_eta: Share of parallel components that ``*_apg`` modes without a plan keep.
        apg_threshold: Largest norm of a difference, per latent frame, of ``*_apg`` modes.
        apg_momentum: Weight of earlier steps' differences in ``*_apg`` modes.
        planning_steps: Steps of the plan.
        planning_flow_steps: Steps of the flow head.
        planning_txt: The plan's guidance from text alone to text and sources.
        planning_img: The plan's guidance from nothing to text alone.
        planning_order: ``random``, ``halton`` or ``confidence``.
        reasoning: What comes before the plan: ``none``; ``text``, in which the planner makes the prompt explicit;
            ``vision``, this and the first frame, edited.
        reasoning_tokens: Most tokens of what the planner writes.
        reasoning_temperature: 0 writes the likeliest words; above that they are drawn.
        frames: Frames of a clip, 4k + 1; most frames of a source clip.
        height: Height in pixels where no source gives the size, a multiple of 16.
        width: Width in pixels, likewise.
        fps: Frames per second of sources and outputs.
        max_edge: Longest edge of a source in pixels; edges become multiples of 16.
        min_edge: Shortest edge of a source in pixels, unless ``max_edge`` forbids it.
        seed: Seed of reasoning, plan and noise.
        negative_prompt: Text of the negative arms; it gets no task sentence.
    """

    mode: str
    steps: int = 40
    shift: float = 5.0
    solver: SolverName = "unipc"
    omega_vid: float = 1.25
    omega_img: float = 4.5
    omega_txt: float = 4.0
    omega_tgt: float = 0.5
    omega_scale: float = 0.8
    apg_eta: float = 0.5
    apg_threshold: float = 50.0
    apg_momentum: float = 0.0
    planning_steps: int = 25
    planning_flow_steps: int = 5
    planning_txt: float = 1.2
    planning_img: float = 1.0
    planning_order: Order = "random"
    reasoning: Reasoning = "none"
    reasoning_tokens: int = 512
    reasoning_temperature: float = 0.0
    frames: int = 81
    height: int = 480
    width: int = 848
    fps: float = 16.0
    max_edge: int = 848
    min_edge: int = 1
    seed: int = 42
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        for name, kind in (("planning_order", Order), ("reasoning", Reasoning), ("solver", SolverName)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}", fix=f"one of {', '.join(get_args(kind))}")
        if self.frames < 1 or self.frames % 4 != 1:
            raise ConfigError(f"frames is {self.frames}", why="the VAE takes 4k + 1 frames", fix="81, 49, 17, 9, ...")
        for name in ("height", "width"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                raise ConfigError(f"{name} is {getattr(self, name)}", why="edges are multiples of 16 pixels")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}", why="it has to be at least 0 and below 2**32")
        positive = ("steps", "shift", "planning_steps", "planning_flow_steps", "reasoning_tokens", "fps")
        for name in (*positive, "max_edge", "min_edge"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}", why="it has to be positive")
        if self.reasoning_temperature < 0:
            raise ConfigError(f"reasoning_temperature is {self.reasoning_temperature}", why="it is at least 0")

    def sampling(self) -> SamplingConfig:
        """What the renderer takes of them."""
        return SamplingConfig(
            steps=self.steps,
            shift=self.shift,
            solver=self.solver,
            mode=self.mode,
            omegas=Omegas(self.omega_vid, self.omega_img, self.omega_txt, self.omega_tgt, self.omega_scale),
            apg=APG(self.apg_eta, self.apg_threshold, self.apg_momentum),
            frames=self.frames,
            height=self.height,
            width=self.width,
            seed=self.seed,
            negative_prompt=self.negative_prompt,
        )

    def planning(self) -> PlanningConfig:
        """What the planner takes of them."""
        return PlanningConfig(
            self.planning_steps, self.planning_flow_steps, self.planning_txt, self.planning_img, self.planning_order
        )

    def writing(self) -> WritingConfig:
        """What the planner's language head takes of them."""
        return WritingConfig(self.reasoning_tokens, self.reasoning_temperature)


TYPES: dict[str, type] = {
    name: kind if isinstance(kind, type) else str for name, kind in get_type_hints(Settings).items()
}
"""Type of each setting; a choice is a string."""

_KINDS = {
    "text": ("t2i", "t2v"),
    "edit": ("i2i", "i2v", "v2v", "ads2v", "mv2v", "vrc2v"),
    "reference": ("r2i", "r2v"),
    "both": ("rv2v", "vi2v"),
}
"""Tasks of one preset. There is no official one of i2v, r2i, vi2v and vrc2v, which go with their nearest kin."""

# omega_vid, omega_img, omega_txt, omega_tgt, omega_scale
_V1 = {
    "text": (1.0, 1.0, 4.0, 0.5, 1.0),
    "edit": (1.25, 1.25, 4.0, 0.5, 0.75),
    "reference": (1.25, 4.5, 4.0, 1.5, 0.8),  # the script's; the released demo's img is 2.5
    "both": (0.75, 3.0, 4.0, 1.5, 0.75),
}
_V2 = {
    "text": (1.0, 1.0, 5.0, 1.2, 1.0),
    "edit": (1.25, 1.25, 4.0, 1.2, 0.75),
    "reference": (1.0, 3.0, 4.5, 1.5, 0.75),
    "both": (1.75, 4.5, 4.0, 0.5, 0.75),  # the script's; demos have 1.75 4 5.5 1.5 .75, and 1.5 3 3.6 1.5 .5
}
_V2_IMAGES = {**_V1, "reference": _V2["reference"]}


def _full(clips: dict[str, Any], images: dict[str, Any], **more: Any) -> dict[str, dict[str, Any]]:
    """Presets of the full model: weights by kind of task, for clips and for images."""
    presets = {}
    for kind, tasks in _KINDS.items():
        for task in tasks:
            image = get_task(task).target == "image"
            weights = dict(zip(("vid", "img", "txt", "tgt", "scale"), (images if image else clips)[kind], strict=True))
            presets[task] = {
                "mode": "rv2v_wapg" if kind == "both" else "vae_txt_vit_wapg",
                **{f"omega_{name}": weight for name, weight in weights.items()},
                "steps": 50 if kind == "text" else 40,
                "min_edge": 240,
                **({"height": 512, "width": 512, "max_edge": 512} if image else {}),
                **more,
            }
    return presets


PRESETS: dict[PresetName, dict[str, dict[str, Any]]] = {
    "r": {name: {"mode": task.guidance} for name, task in TASKS.items()},
    "v1": _full(_V1, _V1),
    "v2": _full(_V2, _V2_IMAGES, planning_steps=50, planning_flow_steps=1),
}
"""What differs from the defaults of `Settings`, by model and task: Bernini-R, and both versions of the full model."""

_SECTIONS = {True: "with_plan", False: "without_plan"}


class Defaults:
    """Settings that a model's folder asks for, and a preset, with plans and without.

    Args:
        told: Content of a folder's ``generate.json``: settings and perhaps a ``preset``, under ``with_plan`` and
            ``without_plan``.

    Raises:
        ConfigError: A key is unknown, or a value of another type.
    """

    def __init__(self, told: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._told = dict(told or {})
        if unknown := self._told.keys() - set(_SECTIONS.values()):
            raise ConfigError(f"unknown key {min(unknown)!r}", why=f"the keys are {' and '.join(_SECTIONS.values())}")
        for planned, name in _SECTIONS.items():
            section = dict(self._told.get(name, {}))
            if "preset" in section:
                check_preset(section.pop("preset"), planned)
            check_names(section)

    @classmethod
    def of(cls, folder: str | Path) -> "Defaults":
        """Those of a folder; none if it has no such file.

        Raises:
            CheckpointError: The file is damaged.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return cls()
        try:
            return cls({**json.loads(path.read_text())})
        except (ValueError, TypeError, AttributeError, ConfigError) as error:
            why = error.what if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            raise CheckpointError("the model's settings cannot be read", where=str(path), why=why) from error

    def save(self, folder: str | Path) -> None:
        """Write the file, unless there is nothing to say."""
        if self._told:
            with replacing(Path(folder) / FILE) as temporary:
                temporary.write_text(json.dumps(self._told, indent=2) + "\n")

    def settle(self, task: str, planned: bool, preset: str | None, *layers: Mapping[str, Any]) -> Settings:
        """Settings of one image or clip: what is asked for goes before the folder's, and this before the preset's.

        Args:
            task: Task name.
            planned: Whether there is a plan.
            preset: Name in `PRESETS`; the folder's own if null: what its file names, else ``v2`` with a plan and ``r``
                without one.
            *layers: Settings that are asked for, by name; later ones go first.

        Raises:
            ConfigError: A task, preset, mode or setting is unknown, has no meaning, or does not go with the others.
        """
        own = dict(self._told.get(_SECTIONS[planned], {}))
        usual = own.pop("preset", "v2" if planned else "r")
        chosen = check_preset(preset or usual, planned)
        told: dict[str, Any] = {**PRESETS[chosen][get_task(task).name], **own}
        for layer in layers:
            check_names(layer)
            told |= layer
        settings = Settings(**told)
        get_mode(settings.mode, planned)
        if settings.reasoning != "none" and not planned:
            raise ConfigError(
                f"reasoning {settings.reasoning!r} without a planner",
                why="it is the planner that reasons",
                fix="use a model with a planner, and let it plan; or a rewriter",
            )
        return settings


def check_preset(name: str, planned: bool) -> PresetName:
    """Give the name back if there is a preset of it.

    Raises:
        ConfigError: There is none, or it does not go with a plan, or without one.
    """
    known = [preset for preset in PRESETS if (preset == "r") != planned]
    if name not in [*PRESETS]:
        raise ConfigError(f"unknown preset {name!r}", why=f"there are {', '.join(PRESETS)}", fix=closest(name, PRESETS))
    if name not in known:
        raise ConfigError(
            f"preset {name!r} is for models {'without' if planned else 'with'} a planner",
            why=f"this one {'plans' if planned else 'does not plan'}",
            fix=f"use {' or '.join(known)}",
        )
    return name  # type: ignore[return-value]


def check_names(given: Mapping[str, Any], where: str = "") -> None:
    """Compare settings with `Settings`.

    Raises:
        ConfigError: A name is unknown, or a value is of another type.
    """
    for name, value in given.items():
        if name not in TYPES:
            fix = closest(name, TYPES)
            raise ConfigError(f"unknown setting {name!r}", where=where, why=f"there are {', '.join(TYPES)}", fix=fix)
        wanted = (int, float) if TYPES[name] is float else TYPES[name]
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ConfigError(f"{name} has the value {value!r}", where=where, why=f"it is a {TYPES[name].__name__}")

"""The task table: what each task takes in, what it makes, and how the released system trains and samples it.

Sources: system sentences and shifts of the released renderer trainer, guidance modes and sizes of its presets.
"""

from dataclasses import dataclass
from typing import Literal

from bernini.errors import ConfigError

Density = Literal["logit_normal", "mode", "uniform"]


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        name: Task name, e.g. ``v2v``.
        sentence: System sentence; the renderer's text is this sentence and the prompt with nothing between them.
        videos: Least and most source videos.
        images: Least and most source images.
        target: Whether the output is one frame or a clip.
        shift: Flow-matching shift of the training timesteps.
        density: Density of the training timesteps before the shift.
        guidance: Default renderer-only guidance mode.
        planner_sentence: System message of the planner; the released planner knows fewer tasks.
    """

    name: str
    sentence: str
    videos: tuple[int, int]
    images: tuple[int, int]
    target: Literal["image", "video"]
    shift: float
    guidance: str

    @property
    def density(self) -> Density:
        """Images are drawn from a logit-normal, clips from the "mode" density (paper eqs 6-7)."""
        return "logit_normal" if self.target == "image" else "mode"

    @property
    def planned_guidance(self) -> str:
        """Default guidance mode with a plan, as released: clip and references, where both are, in two steps."""
        return "rv2v_wapg" if self.videos[0] and self.images[0] else "vae_txt_vit_wapg"

    @property
    def planner_sentence(self) -> str:
        """The planner's system message: the same sentence for the tasks it was trained on, else the default one."""
        return self.sentence if self.name in _PLANNER_TASKS else DEFAULT_SENTENCE


_HELPER = "You are a helpful assistant"
DEFAULT_SENTENCE = f"{_HELPER}."
_PLANNER_TASKS = frozenset({"t2i", "t2v", "i2i", "v2v", "r2v", "rv2v"})
MANY = 64  # the released template numbers at most 64 visuals


def _special(subject: str) -> str:
    return f"{_HELPER} specialized in {subject}."


_NONE, _ONE, _SOME, _ANY = (0, 0), (1, 1), (1, MANY), (0, MANY)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("t2i", _special("text-to-image generation"), _NONE, _NONE, "image", 3.0, "t2v_apg"),
        Task("i2i", _special("image editing"), _NONE, _ONE, "image", 4.0, "v2v"),
        Task("t2v", _special("text-to-video generation"), _NONE, _NONE, "video", 3.0, "t2v_apg"),
        Task("i2v", _special("image-to-video generation"), _NONE, _ONE, "video", 5.0, "v2v"),
        Task("v2v", _special("video editing"), _ONE, _NONE, "video", 5.0, "v2v_apg"),
        Task("r2i", _special("subject-to-image generation"), _NONE, _SOME, "image", 4.0, "r2v_apg"),
        Task("r2v", _special("subject-to-video generation"), _NONE, _SOME, "video", 4.0, "r2v_apg"),
        Task("rv2v", _special("video editing with reference"), _ONE, _SOME, "video", 5.0, "rv2v"),
        Task("vi2v", _special("video editing on content propagation"), _ONE, _ONE, "video", 5.0, "rv2v"),
        Task("ads2v", _special("ads insertion"), (2, 2), _ANY, "video", 5.0, "v2v_apg"),
        Task(
            "mv2v",
            f"{_HELPER} for editing. You might need to adjust the video's style, lighting, colors, textures, and the "
            "subject's pose or action.",
            _ONE,
            _NONE,
            "video",
            5.0,
            "v2v_apg",
        ),
        Task(
            "vrc2v",
            f"{_HELPER} for editing. You may need to adjust the subject's action or position.",
            _ONE,
            _ANY,
            "video",
            5.0,
            "v2v_apg",
        ),
    )
}

ALIASES = {"vr2v": "rv2v"}
"""Names that the released trainer also uses."""

UNDERSTANDING = ("und_img", "und_txt", "und_vid")
"""Tasks of the planner alone, about an image, a text or a clip: the answer is text."""


def get_task(name: str) -> Task:
    """Look a task up by name or alias.

    Raises:
        ConfigError: The name is not in the table, be it that its answer is text.
    """
    from difflib import get_close_matches

    key = ALIASES.get(name.lower(), name.lower())
    if key in UNDERSTANDING:
        raise ConfigError(
            f"task {name!r} makes no image or clip",
            why="its answer is text, which the planner alone learns",
            fix=f"use one of {', '.join(TASKS)}",
        )
    if key not in TASKS:
        near = get_close_matches(key, TASKS, 1, 0.3)
        hint = f"did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown task {name!r}", why=f"the tasks are {', '.join(TASKS)}", fix=hint or "use one of the names above"
        )
    return TASKS[key]

"""What the toy world is made of: its vocabulary, the record of a scene, where things are at a time, and captions.

Lengths are fractions of the frame's short side, times run from 0 (first frame) to 1 (last frame), so a scene can be
rendered at any size and length.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 190, 70),
    "blue": (40, 80, 235),
    "yellow": (245, 225, 50),
    "purple": (160, 50, 210),
    "orange": (240, 125, 20),
    "cyan": (50, 210, 225),
    "white": (245, 245, 245),
}
"""RGB of a thing's light tone. The brightest channel is at least 190: dim light cannot be mistaken for a colour."""

SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
TEXTURES = ("plain", "striped", "checkered")
DARK_TONE = 0.45
"""Second tone of a texture, as a share of the thing's colour."""

SIZES = {"small": 0.11, "large": 0.17}
"""Radius of the circle of that size, in short sides."""

MOTIONS: dict[str, tuple[int, int]] = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Direction (x, y) of each motion, y downwards."""

Cell = tuple[float, float, float, float]
PLACES: dict[str, Cell] = {
    "centre": (0.0, 0.0, 1.0, 1.0),
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
}
"""Cell (x0, y0, x1, y1) that a thing never leaves, in shares of the frame's width and height."""

CORNER = "corner"
"""Place of an inserted logo: the bottom right corner."""

OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
"""Places whose cells do not touch: two things of one scene are in opposite places."""

Ramp = tuple[tuple[int, int, int], tuple[int, int, int]]
BACKGROUNDS: dict[str, Ramp] = {
    "black": ((14, 14, 16), (14, 14, 16)),
    "gray": ((165, 165, 165), (165, 165, 165)),
    "beige": ((228, 205, 165), (228, 205, 165)),
    "pink-to-lilac": ((235, 170, 185), (170, 150, 215)),
}
"""RGB at the top and at the bottom edge, linear in between."""

LIGHTING = {"bright": 1.0, "dim": 0.5}
"""Factor on every pixel."""

MARGIN = 0.035
"""Least distance of a thing to the border of its cell."""

TRAVEL = 0.5
"""Longest way that a thing goes in a clip."""

JITTER = 0.03
"""Largest offset of a thing from the middle of its cell."""


@dataclass(frozen=True)
class Thing:
    """One thing of a scene.

    Attributes:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        texture: One of `TEXTURES`.
        size: One of `SIZES`.
        motion: One of `MOTIONS`; a moving thing passes the middle of its cell at time 0.5.
        place: One of `PLACES`, or `CORNER`.
        x: Offset from the middle of the cell in [-1, 1], in units of `JITTER`, across the direction of motion.
        y: The same, vertically.
    """

    shape: str
    colour: str
    texture: str
    size: str
    motion: str = "still"
    place: str = "centre"
    x: float = 0.0
    y: float = 0.0

    @property
    def name(self) -> str:
        """How an instruction calls it, e.g. ``the red circle``; unique in a scene."""
        return f"the {self.colour} {self.shape}"

    @property
    def looks(self) -> str:
        """Its full description, e.g. ``a large red striped circle``; plain is not said."""
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"a {self.size} {self.colour} {texture}{self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things on a background, in some light.

    Attributes:
        things: What is seen, drawn in order; things never overlap.
        background: One of `BACKGROUNDS`.
        lighting: One of `LIGHTING`.
    """

    things: tuple[Thing, ...]
    background: str = "black"
    lighting: str = "bright"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, read back by `from_json`."""
        return {**asdict(self), "things": [asdict(thing) for thing in self.things]}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Scene":
        """Read what `to_json` wrote."""
        return cls(**{**row, "things": tuple(Thing(**thing) for thing in row["things"])})


def held_out(thing: Thing) -> bool:
    """Whether the thing's colour, shape and motion together are kept for the held-out split (about 15 % are)."""
    words = f"{thing.colour} {thing.shape} {thing.motion}"
    return hashlib.sha256(words.encode()).digest()[0] < 0.15 * 256


def path(thing: Thing, times: Sequence[float], height: int, width: int) -> list[tuple[float, float]]:
    """Where the thing's centre is.

    Args:
        thing: The thing.
        times: Times in [0, 1].
        height: Frame height in pixels.
        width: Frame width in pixels.

    Returns:
        One (x, y) per time, in pixels from the frame's upper left corner.
    """
    unit = min(height, width)
    reach = (SIZES[thing.size] + MARGIN) * unit
    if thing.place == CORNER:
        return [(width - reach, height - reach) for _ in times]
    x0, y0, x1, y1 = PLACES[thing.place]
    axes = zip(
        (x0 * width, y0 * height), (x1 * width, y1 * height), (thing.x, thing.y), MOTIONS[thing.motion], strict=True
    )
    columns = []
    for low, high, offset, direction in axes:
        free = high - low - 2 * reach
        middle = (low + high) / 2 + (0 if direction else offset * min(free / 2, JITTER * unit))
        columns.append([middle + direction * (time - 0.5) * min(free, TRAVEL * unit) for time in times])
    return list(zip(*columns, strict=True))


def where(place: str) -> str:
    """The place in words, e.g. ``on the left``."""
    if place in ("left", "right"):
        return f"on the {place}"
    return f"in the {place}" if place in ("centre", CORNER) else f"at the {place}"


def act(motion: str) -> str:
    """The motion as a command, e.g. ``move left``."""
    return "stay still" if motion == "still" else f"move {motion}"


def acts(motion: str) -> str:
    """The motion as a statement, e.g. ``moves left``."""
    return act(motion).replace(" ", "s ", 1)


def setting(scene: Scene) -> str:
    """Background and light in words, e.g. ``on a black background in dim light``."""
    return f"on a {scene.background} background" + (" in dim light" if scene.lighting == "dim" else "")


def caption(scene: Scene, moving: bool = True, names: Sequence[str] | None = None) -> str:
    """Describe a scene in one sentence.

    Args:
        scene: The scene.
        moving: Whether to say how things move; false for images.
        names: What to call the things instead of describing their looks.
    """
    subjects = [thing.looks for thing in scene.things] if names is None else names
    clauses = (
        f"{subject} {where(thing.place)}" + (f" {acts(thing.motion)}" if moving else "")
        for subject, thing in zip(subjects, scene.things, strict=True)
    )
    return f"{' and '.join(clauses)}, {setting(scene)}"

"""Edit kinds of the toy world: what each changes in a scene and how it is asked for."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from numpy.random import Generator

from datamodules.toyworld.scene import (
    BACKGROUNDS,
    COLOURS,
    LIGHTING,
    MOTIONS,
    OPPOSITE,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    act,
    acts,
    where,
)


@dataclass(frozen=True)
class Kind:
    """An edit that gives one attribute another value.

    Attributes:
        attribute: Field of `Thing`, or of `Scene` if ``whole``.
        values: What it can become.
        texts: Ways to ask for it; ``{name}`` is the thing, ``{value}``, ``{act}`` and ``{where}`` the new value.
        whole: Whether it changes the scene rather than a thing.
    """

    attribute: str
    values: Iterable[str]
    texts: tuple[str, ...]
    whole: bool = False


CHANGES: dict[str, Kind] = {
    "recolour": Kind("colour", COLOURS, ("make {name} {value}", "change the colour of {name} to {value}")),
    "reshape": Kind("shape", SHAPES, ("turn {name} into a {value}", "change the shape of {name} to a {value}")),
    "retexture": Kind("texture", TEXTURES, ("make {name} {value}", "give {name} a {value} texture")),
    "resize": Kind("size", SIZES, ("make {name} {value}", "change the size of {name} to {value}")),
    "motion": Kind("motion", MOTIONS, ("make {name} {act}", "let {name} {act}")),
    "move": Kind("place", PLACES, ("place {name} {where}", "{name} should be {where}")),
    "background": Kind(
        "background", BACKGROUNDS, ("make the background {value}", "change the background to {value}"), whole=True
    ),
    "lighting": Kind("lighting", LIGHTING, ("make the light {value}", "change the light to {value}"), whole=True),
}
"""Edits of one attribute."""

_EDITS = ("recolour", "reshape", "retexture", "resize", "remove", "add", "background")
EDITS: dict[str, tuple[str, ...]] = {
    "i2i": _EDITS,
    "v2v": _EDITS,
    "mv2v": (*_EDITS, "motion", "lighting"),
    "vi2v": tuple(kind for kind in _EDITS if kind != "add"),  # the first frame cannot say how a new thing moves
    "vrc2v": ("motion", "move"),
    "rv2v": ("replace",),
    "ads2v": ("insert",),
}
"""Edit kinds of the tasks that change a source."""

UNSEEN: dict[str, tuple[str, ...]] = {"i2i": ("reason", "cot"), "v2v": ("statue", "reason", "cot")}
"""Edit kinds that are only drawn where they are named: the toy family has not seen them. ``cot`` is ``reason`` with the
reasoning to learn."""

COUNTS: dict[str, tuple[int, ...]] = {"remove": (2,), "add": (1,), "move": (1,), "insert": (1,)}
"""How many things the source has, for the kinds that care; one or two for the others."""


def pick(rng: Generator, values: Iterable[str]) -> str:
    """One of the values, all alike likely."""
    options = list(values)
    return options[int(rng.integers(len(options)))]


def draw_thing(rng: Generator, place: str, moving: bool) -> Thing:
    """A thing at a place; one that is not ``moving`` stays still."""
    return Thing(
        shape=pick(rng, SHAPES),
        colour=pick(rng, COLOURS),
        texture=pick(rng, TEXTURES),
        size=pick(rng, SIZES),
        motion=pick(rng, MOTIONS) if moving else "still",
        place=place,
        x=round(float(rng.uniform(-1, 1)), 3),
        y=round(float(rng.uniform(-1, 1)), 3),
    )


def draw_scene(
    rng: Generator, counts: Iterable[int] = (1, 2), moving: bool = True, places: Iterable[str] = PLACES
) -> Scene:
    """A scene of one or two things; the first one of two is in a place that has an opposite."""
    two = int(rng.choice(tuple(counts))) == 2
    first = pick(rng, [place for place in places if not two or place in OPPOSITE])
    lanes = (first, OPPOSITE[first]) if two else (first,)
    return Scene(tuple(draw_thing(rng, lane, moving) for lane in lanes), pick(rng, BACKGROUNDS))


def altered(scene: Scene, number: int, **values: str) -> Scene:
    """The scene with other values of attributes of one thing."""
    things = list(scene.things)
    things[number] = replace(things[number], **values)  # type: ignore[arg-type]
    return replace(scene, things=tuple(things))


def without(scene: Scene, number: int) -> Scene:
    """The scene without one of its things."""
    return replace(scene, things=scene.things[:number] + scene.things[number + 1 :])


def worded(text: str, name: str, value: str) -> str:
    """A text of `Kind` for one thing and one new value."""
    return text.format(name=name, value=value, act=act(value), where=where(value))


def edit(
    kind: str, scene: Scene, rng: Generator, moving: bool = True, name: str | None = None, number: int = 0
) -> tuple[Scene, str]:
    """Change a scene.

    Args:
        kind: A key of `CHANGES`, ``remove``, ``add`` or ``statue``.
        scene: The source.
        rng: Draws which thing, the new value and the wording.
        moving: Whether a thing that is added may move; its motion is said then.
        name: What to call the thing that changes, instead of drawing one and calling it by its own name.
        number: Which thing is called so.

    Returns:
        The target and the instruction. Things keep their order; an added one comes last.
    """
    chosen = number if name is not None else int(rng.integers(len(scene.things)))
    thing = scene.things[chosen]
    name = name or thing.name
    if kind == "remove":
        return without(scene, chosen), pick(rng, (f"remove {name}", f"delete {name}"))
    if kind == "add":
        new = draw_thing(rng, OPPOSITE[thing.place], moving)
        motion = f" that {acts(new.motion)}" if moving else ""
        text = f"{pick(rng, ('add', 'put'))} {new.looks}{motion} {where(new.place)}"
        return replace(scene, things=(*scene.things, new)), text
    if kind == "statue":  # gold and motionless: one new word that changes three attributes
        statue = altered(scene, chosen, colour="yellow", texture="plain", motion="still")
        return statue, f"turn {name} into a golden statue"
    change = CHANGES[kind]
    old = getattr(scene if change.whole else thing, change.attribute)
    value = pick(rng, (value for value in change.values if value != old))
    text = worded(pick(rng, change.texts), name, value)
    new_value: dict[str, Any] = {change.attribute: value}
    return replace(scene, **new_value) if change.whole else altered(scene, chosen, **new_value), text

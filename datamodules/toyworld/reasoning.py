"""Edits that say by reasoning what they change, or what it becomes; there is exactly one right result."""

from dataclasses import dataclass

from numpy.random import Generator

from datamodules.toyworld.edits import CHANGES, altered, draw_scene, edit, pick, without, worded
from datamodules.toyworld.referring import REASONINGS, by_reasoning
from datamodules.toyworld.scene import Scene

REASONS = (*REASONINGS, "exception", "copy", "swap", "reverse")
"""Kinds of reasoning: which thing is meant (`REASONINGS`, ``exception``), what the other thing is like (``copy``,
``swap``), which way is the other one (``reverse``)."""

_MOVING = ("motion", "reverse")
_LOOKS = ("recolour", "reshape", "retexture", "resize")
_BACK = {"left": "right", "right": "left", "up": "down", "down": "up"}


@dataclass(frozen=True)
class Reasoned:
    """A reasoning edit.

    Attributes:
        kind: One of `REASONS`.
        source: The scene before it, of two things.
        target: The scene after it; things keep their order.
        text: The instruction.
        explicit: The same with the result of the reasoning, e.g. ``remove the red circle``.
    """

    kind: str
    source: Scene
    target: Scene
    text: str
    explicit: str


def draw_reasoned(rng: Generator, moving: bool = True) -> Reasoned:
    """Draw a scene and a reasoning edit of it.

    Args:
        rng: Draws everything.
        moving: Whether things may move; no kind is about motion if not.
    """
    kind = pick(rng, (kind for kind in REASONS if moving or kind not in _MOVING))
    while (found := _attempt(kind, draw_scene(rng, (2,), moving), rng)) is None:
        pass
    return found


def _attempt(kind: str, scene: Scene, rng: Generator) -> Reasoned | None:
    """An edit of the scene, or none where that kind of reasoning leads to no single result."""
    number = int(rng.integers(2))
    thing, other = scene.things[number], scene.things[1 - number]
    if kind in REASONINGS:
        phrases = by_reasoning(scene, number)[kind]
        if not phrases:
            return None
        target, text = edit(pick(rng, (*_LOOKS, "remove")), scene, rng, name="{thing}", number=number)
        return Reasoned(
            kind, scene, target, text.format(thing=pick(rng, phrases)), text.format(thing=scene.things[number].name)
        )
    if kind == "exception":
        text = pick(rng, ("remove everything but {thing}", "keep only {thing}")).format(thing=thing.name)
        return Reasoned(kind, scene, without(scene, 1 - number), text, f"remove {other.name}")
    if kind == "reverse":
        if thing.motion == "still":
            return None
        motion = _BACK[thing.motion]
        text = pick(rng, ("make {thing} move the other way", "let {thing} move the other way")).format(thing=thing.name)
        explicit = worded(CHANGES["motion"].texts[0], thing.name, motion)
        return Reasoned(kind, scene, altered(scene, number, motion=motion), text, explicit)
    look = CHANGES[pick(rng, _LOOKS)]
    own, others = (getattr(each, look.attribute) for each in (thing, other))
    if own == others:
        return None
    target, explicit = altered(scene, number, **{look.attribute: others}), worded(look.texts[0], thing.name, others)
    if kind == "copy":
        texts = "give {thing} the {attribute} of the other thing", "make the {attribute} of {thing} that of the other"
    else:
        texts = "swap the {attribute}s of the two things", "let the two things swap their {attribute}s"
        target = altered(target, 1 - number, **{look.attribute: own})
        explicit = f"{explicit} and {worded(look.texts[0], other.name, own)}"
    text = pick(rng, texts).format(thing=thing.name, attribute=look.attribute)
    return Reasoned(kind, scene, target, text, explicit)

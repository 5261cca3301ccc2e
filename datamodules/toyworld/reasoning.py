"""Edits that say by reasoning what they change, or what it becomes; there is exactly one right result."""

from collections.abc import Sequence
from dataclasses import dataclass

from numpy.random import Generator

from datamodules.toyworld.edits import CHANGES, altered, draw_scene, edit, pick, without, worded
from datamodules.toyworld.referring import REASONINGS, by_reasoning, stated
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
        why: What is seen, and what follows from it.
    """

    kind: str
    source: Scene
    target: Scene
    text: str
    explicit: str
    why: str

    @property
    def thought(self) -> str:
        """The reasoning in full: why, an empty line, and the explicit instruction."""
        return f"{self.why}.\n\n{self.explicit}"


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
        phrase = pick(rng, phrases)
        why = f"{_seen(scene, phrases[phrase])}, so {phrase} is {thing.name}"
        return Reasoned(kind, scene, target, text.format(thing=phrase), text.format(thing=thing.name), why)
    if kind == "exception":
        text = pick(rng, ("remove everything but {thing}", "keep only {thing}")).format(thing=thing.name)
        why = f"there are {_in_order(scene, [each.name for each in scene.things])}, so {other.name} goes"
        return Reasoned(kind, scene, without(scene, 1 - number), text, f"remove {other.name}", why)
    if kind == "reverse":
        if thing.motion == "still":
            return None
        motion = _BACK[thing.motion]
        text = pick(rng, ("make {thing} move the other way", "let {thing} move the other way")).format(thing=thing.name)
        explicit = worded(CHANGES["motion"].texts[0], thing.name, motion)
        why = f"{stated(thing, 'motion')}, so the other way is {motion}"
        return Reasoned(kind, scene, altered(scene, number, motion=motion), text, explicit, why)
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
        became = (
            worded(look.texts[0], old.name, getattr(new, look.attribute))
            for old, new in zip(scene.things, target.things, strict=True)
        )
        explicit = _in_order(scene, list(became))
    text = pick(rng, texts).format(thing=thing.name, attribute=look.attribute)
    return Reasoned(kind, scene, target, text, explicit, _seen(scene, look.attribute))


def _seen(scene: Scene, attribute: str) -> str:
    """What both things are like in one respect."""
    return _in_order(scene, [stated(thing, attribute) for thing in scene.things])


def _in_order(scene: Scene, parts: Sequence[str]) -> str:
    """What is said of both things, the left or upper one first: an order that is seen."""
    return " and ".join(sorted(parts, key=lambda part: scene.things[parts.index(part)].place in ("right", "bottom")))

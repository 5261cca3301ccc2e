"""Scoring an output against what was asked for."""

from dataclasses import dataclass
from itertools import permutations

from torch import Tensor

from bernini.conversation import Conversation
from bernini.errors import DataError
from datamodules.toyworld.reading import read
from datamodules.toyworld.scene import Scene, Thing

LOOKS = ("shape", "colour", "texture")
LAYOUT = ("size", "place")
WHOLE = ("background", "lighting")

Slot = tuple[int | None, str]
"""A fact that can be right or wrong: number of a thing of the target, none for the scene, and attribute."""


@dataclass(frozen=True)
class _Match:
    """The seen thing for every expected one, ``None`` if there is none, and what was seen besides."""

    found: tuple[Thing | None, ...]
    extra: tuple[Thing, ...]


def _match(expected: tuple[Thing, ...], seen: tuple[Thing, ...]) -> _Match:
    """Pair things so that most attributes agree; at a draw, the place decides."""

    def agreement(pair: tuple[Thing, Thing | None]) -> int:
        a, b = pair
        return (
            0 if b is None else sum((1 + (k == "place")) * (getattr(a, k) == getattr(b, k)) for k in (*LOOKS, *LAYOUT))
        )

    def total(order: tuple[int | None, ...]) -> tuple[int, int]:
        pairs = [(a, None if i is None else seen[i]) for a, i in zip(expected, order, strict=True)]
        return sum(map(agreement, pairs)), sum(i is not None for i in order)

    numbers: list[int | None] = [*range(len(seen)), *[None] * len(expected)]
    best = max(permutations(numbers, len(expected)), key=total)
    extra = tuple(thing for i, thing in enumerate(seen) if i not in best)
    return _Match(tuple(None if i is None else seen[i] for i in best), extra)


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags) if flags else 1.0


def _changed(source: Scene, target: Scene, slots: list[Slot]) -> set[Slot]:
    """Slots of the target that the source does not have alike; a removed thing leaves none."""
    if len(target.things) < len(source.things):
        return set()
    changed: set[Slot] = set()
    for number, attribute in slots:
        if number is None:
            same = getattr(source, attribute) == getattr(target, attribute)
        else:
            new = number >= len(source.things)
            same = not new and getattr(source.things[number], attribute) == getattr(target.things[number], attribute)
        if not same:
            changed.add((number, attribute))
    return changed


def judge(item: Conversation, output: Tensor) -> dict[str, float]:
    """Score an output by reading it (`read`) and comparing with the item's truth.

    Things that are seen are paired with those of the target so that most attributes agree. A missing thing has every
    attribute wrong, and a thing too many counts as one more with every attribute wrong.

    Args:
        item: A sample of `make_item`; of its pixels none are used.
        output: What was made for it, ``[3, T, H, W]``, uint8 or floats in [-1, 1], any length and size.

    Returns:
        Scores in [0, 1], those that apply to the task:

        - ``attributes`` (all tasks): the share right of shape, colour, texture, size and place of every thing, of the
          background and the light of the target.
        - ``motion`` (clips): the share of the target's things whose direction of motion, or stillness, is right; things
          too many count as wrong.
        - ``edit_done`` (tasks with an edit): 1 if everything that tells the target from the source is right, else 0.
          For a removal: 1 if nothing is in the place of the one to be removed.
        - ``rest_unchanged`` (the same tasks): the share right of all other attributes and motions, which the target has
          from the source.
        - ``identity`` (tasks with a reference): the share right of shape, colour and texture of the things that the
          references show.

    Raises:
        DataError: The item carries no truth, or the output is not a clip.
    """
    if "truth" not in item.info:
        raise DataError(
            "the sample has no truth to compare with", where=item.key, fix="judge samples of the toy world only"
        )
    truth = item.info["truth"]
    target = Scene.from_json(truth["target"])
    clip = item.spec.target == "video"
    seen = read(output).scene
    match = _match(target.things, seen.things)
    attributes = (*LOOKS, *LAYOUT, *(("motion",) if clip else ()))
    right: dict[Slot, bool] = {(None, name): getattr(seen, name) == getattr(target, name) for name in WHOLE}
    for number, (thing, found) in enumerate(zip(target.things, match.found, strict=True)):
        for name in attributes:
            right[number, name] = found is not None and getattr(found, name) == getattr(thing, name)

    still = [ok for (_, name), ok in right.items() if name != "motion"]
    scores = {"attributes": _share(still + [False] * len((*LOOKS, *LAYOUT)) * len(match.extra))}
    if clip:
        motion = [ok for (_, name), ok in right.items() if name == "motion"]
        scores["motion"] = _share(motion + [False] * len(match.extra))
    if truth["edit"]:
        source = Scene.from_json(truth["sources"][0])
        changed = _changed(source, target, list(right))
        extra = match.extra
        if len(target.things) < len(source.things):
            (gone,) = set(source.things) - set(target.things)
            extra = tuple(thing for thing in extra if thing.place != gone.place)
            # Not only things too many: if the wrong one is gone, there are none.
            scores["edit_done"] = float(all(thing.place != gone.place for thing in seen.things))
        else:
            scores["edit_done"] = float(all(right[slot] for slot in changed))
        rest = [ok for slot, ok in right.items() if slot not in changed]
        scores["rest_unchanged"] = _share(rest + [False] * len(attributes) * len(extra))
    if truth["references"]:
        scores["identity"] = _share([right[number, name] for number in truth["references"] for name in LOOKS])
    return scores

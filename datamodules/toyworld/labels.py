"""A scene of the toy world as answers to a fixed list of questions, for probes and classifiers."""

from typing import Any

from datamodules.toyworld.scene import (
    BACKGROUNDS,
    COLOURS,
    CORNER,
    LIGHTING,
    MOTIONS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
)

_OF_THINGS = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "size": tuple(SIZES),
    "motion": tuple(MOTIONS),
}
_OF_SCENES = {"background": tuple(BACKGROUNDS), "lighting": tuple(LIGHTING)}

ANSWERS: dict[str, tuple[str, ...]] = {
    **{
        f"{place}.{name}": answers
        for place in (*PLACES, CORNER)
        for name, answers in {"thing": ("no", "yes"), **_OF_THINGS}.items()
    },
    **_OF_SCENES,
}
"""Possible answers of every slot: for each place whether there is a thing and how it looks, then the whole scene."""

SLOTS: dict[str, int] = {name: len(answers) for name, answers in ANSWERS.items()}
"""Slots and how many answers they have."""


def scene_labels(truth: dict[str, Any], moving: bool = True) -> list[int]:
    """Answers for the target of a sample.

    Args:
        truth: ``info["truth"]`` of a sample of `make_item`.
        moving: Whether the target is a clip; an image does not show motion.

    Returns:
        Number of the answer in `ANSWERS` for every slot, in its order; -1 where the question does not arise: how a
        thing looks that is not there, or moves in an image.
    """
    scene = Scene.from_json(truth["target"])
    said = {name: getattr(scene, name) for name in _OF_SCENES}
    said |= {f"{place}.thing": "no" for place in (*PLACES, CORNER)}
    for thing in scene.things:
        said[f"{thing.place}.thing"] = "yes"
        said |= {f"{thing.place}.{name}": getattr(thing, name) for name in _OF_THINGS if moving or name != "motion"}
    return [answers.index(said[slot]) if slot in said else -1 for slot, answers in ANSWERS.items()]

"""Ways to say which thing of a scene is meant; every one that is offered fits that thing alone."""

from collections.abc import Container

from datamodules.toyworld.scene import Scene, Thing, acts, where

_NAMED = {
    "shape": "the {shape}",
    "colour": "the {colour} thing",
    "texture": "the {texture} thing",
    "size": "the {size} thing",
    "place": "the thing {where}",
    "motion": "the thing that {acts}",
}
_DENIED = {"shape": "a {value}", "colour": "{value}", "texture": "{value}", "size": "{value}"}
_BESIDE = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}

REASONINGS = ("motion", "comparison", "negation", "relation")
"""Kinds of `by_reasoning`; an image shows no motion."""


def by_attribute(scene: Scene, number: int, hidden: Container[str] = ()) -> list[str]:
    """Name a thing by what is seen of it.

    Args:
        scene: The scene.
        number: The thing's number in it.
        hidden: Attributes that must not be said: those that are asked for, and ``motion`` for images.

    Returns:
        Phrases such as ``the red thing``, ``the thing on the left`` or, for a thing alone, ``the thing``. There is one
        for every thing of a scene unless both its place and its colour or shape are hidden.
    """
    thing = scene.things[number]
    others = [other for i, other in enumerate(scene.things) if i != number]
    words = {**vars(thing), "where": where(thing.place), "acts": acts(thing.motion)}
    phrases = [
        phrase.format(**words)
        for attribute, phrase in _NAMED.items()
        if attribute not in hidden and all(getattr(o, attribute) != getattr(thing, attribute) for o in others)
    ]
    if "shape" not in hidden and "colour" not in hidden:
        phrases.append(thing.name)
    return phrases if others else [*phrases, "the thing"]


def by_reasoning(scene: Scene, number: int) -> dict[str, dict[str, str]]:
    """Name one of two things so that it takes a look at both to know which is meant.

    Args:
        scene: A scene of two things.
        number: The thing's number in it, 0 or 1.

    Returns:
        By kind of `REASONINGS`, phrases such as ``the thing that does not move``, ``the larger thing``, ``the thing
        that is not red`` and ``the thing left of the blue ring``, each with the attribute to look at; none where a kind
        does not tell the two apart.
    """
    thing, other = scene.things[number], scene.things[1 - number]
    moves, other_moves = thing.motion != "still", other.motion != "still"
    motion = ["the thing that moves"] if moves else ["the thing that stays still", "the thing that does not move"]
    size = "larger" if thing.size == "large" else "smaller"
    denied = {
        f"the thing that is not {words.format(value=getattr(other, attribute))}": attribute
        for attribute, words in _DENIED.items()
        if getattr(thing, attribute) != getattr(other, attribute)
    }
    return {
        "motion": dict.fromkeys(motion, "motion") if moves != other_moves else {},
        "comparison": {f"the {size} thing": "size"} if thing.size != other.size else {},
        "negation": denied,
        "relation": {f"the thing {_BESIDE[thing.place]} {other.name}": "place"},
    }


def stated(thing: Thing, attribute: str) -> str:
    """What a thing is like in one respect, as a clause such as ``the red square is striped``."""
    value = getattr(thing, attribute)
    if attribute == "motion":
        return f"{thing.name} {acts(value)}"
    said = {"shape": f"a {value}", "place": where(value)}.get(attribute, value)
    return f"{thing.name} is {said}"

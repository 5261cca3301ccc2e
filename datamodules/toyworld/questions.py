"""Understanding samples: an image or a clip, a question, and its one right answer in words."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from numpy.random import Generator

from bernini.conversation import Conversation, Media, Message
from bernini.errors import ConfigError
from datamodules.toyworld.edits import draw_scene, pick
from datamodules.toyworld.items import FPS, Plan, Split, sample_rng
from datamodules.toyworld.referring import by_attribute, by_reasoning
from datamodules.toyworld.render import render
from datamodules.toyworld.scene import (
    BACKGROUNDS,
    COLOURS,
    LIGHTING,
    MOTIONS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    act,
    acts,
    caption,
    where,
)


@dataclass(frozen=True)
class Attribute:
    """What can be asked about an attribute of a thing; ``{thing}`` is the thing.

    Attributes:
        values: What it can be.
        texts: Ways to ask for it.
        claims: Ways to ask whether it has a value, in one of its forms ``{value}``, ``{act}``, ``{acts}``, ``{where}``.
        said: How its value is said in an answer.
    """

    values: Iterable[str]
    texts: tuple[str, ...]
    claims: tuple[str, ...]
    said: Callable[[str], str] = str


_IS = ("is {thing} {value}?", "is it true that {thing} is {value}?")


def _look(name: str, values: Iterable[str], claims: tuple[str, ...] = _IS) -> Attribute:
    return Attribute(values, (f"what {name} is {{thing}}?", f"what is the {name} of {{thing}}?"), claims)


ATTRIBUTES: dict[str, Attribute] = {
    "colour": _look("colour", COLOURS),
    "shape": _look("shape", SHAPES, tuple(text.replace("{value}", "a {value}") for text in _IS)),
    "texture": _look("texture", TEXTURES),
    "size": _look("size", SIZES),
    "place": Attribute(
        PLACES,
        ("where is {thing}?", "what is the place of {thing}?"),
        tuple(text.replace("{value}", "{where}") for text in _IS),
        where,
    ),
    "motion": Attribute(
        MOTIONS,
        ("what does {thing} do?", "how does {thing} move?"),
        ("does {thing} {act}?", "is it true that {thing} {acts}?"),
        acts,
    ),
}
"""What is asked about things; motion in clips only."""

NAMES = tuple(f"the {colour} {shape}" for colour in COLOURS for shape in SHAPES)
NUMBERS = ("none", "one", "two")
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Question:
    """A question and what can be answered.

    Attributes:
        text: The question.
        answer: Its right answer.
        choices: All answers that questions of its kind can have; none for a caption.
    """

    text: str
    answer: str
    choices: tuple[str, ...] = ()


def _caption(rng: Generator, scene: Scene, medium: str) -> Question:
    texts = (f"describe the {medium}", f"what does the {medium} show?", f"what is in the {medium}?")
    return Question(pick(rng, texts), caption(scene, medium == "video"))


def _attribute(rng: Generator, scene: Scene, medium: str, name: str) -> Question:
    attribute, (number, phrase) = ATTRIBUTES[name], _one_of(rng, scene, medium, name)
    choices = tuple(map(attribute.said, attribute.values))
    answer = attribute.said(getattr(scene.things[number], name))
    return Question(pick(rng, attribute.texts).format(thing=phrase), answer, choices)


def _one_of(rng: Generator, scene: Scene, medium: str, *hidden: str) -> tuple[int, str]:
    """Number and phrase of a thing; the phrase says no hidden attribute, nor motion of an image."""
    number = int(rng.integers(len(scene.things)))
    phrases = by_attribute(scene, number, hidden if medium == "video" else (*hidden, "motion"))
    return number, pick(rng, phrases)


def _background(rng: Generator, scene: Scene, medium: str) -> Question:
    texts = "what is the background?", f"what background does the {medium} have?"
    return Question(pick(rng, texts), scene.background, tuple(BACKGROUNDS))


def _light(rng: Generator, scene: Scene, medium: str) -> Question:
    return Question(pick(rng, ("how is the light?", "is the light bright or dim?")), scene.lighting, tuple(LIGHTING))


def _count(rng: Generator, scene: Scene, medium: str) -> Question:
    """How many things there are, how many have some look, or how many move."""
    name = pick(rng, ("", "colour", "shape", "texture", "size", *(("motion",) if medium == "video" else ())))
    if not name:
        number, texts = len(scene.things), ("how many things are there?", f"how many things does the {medium} show?")
    elif name == "motion":
        number = sum(thing.motion != "still" for thing in scene.things)
        texts = "how many things move?", "how many of the things move?"
    else:
        seen = [getattr(thing, name) for thing in scene.things]
        value = pick(rng, seen if rng.integers(2) else ATTRIBUTES[name].values)
        number = seen.count(value)
        many = f"{value} things" if name != "shape" else f"{value}es" if value.endswith("s") else f"{value}s"
        texts = f"how many {many} are there?", f"how many {many} does the {medium} show?"
    return Question(pick(rng, texts), NUMBERS[number], NUMBERS)


def _which(rng: Generator, scene: Scene, medium: str) -> Question | None:
    """Which of two things fits a description that compares them."""
    if len(scene.things) < 2:
        return None
    number = int(rng.integers(2))
    reasonings = [phrases for phrases in by_reasoning(scene, number).values() if phrases]
    phrase = pick(rng, reasonings[int(rng.integers(len(reasonings)))])
    text = pick(rng, ("which is {thing}?", "what is {thing}?", "name {thing}")).format(thing=phrase)
    return Question(text, scene.things[number].name, NAMES)


def _whether(rng: Generator, scene: Scene, medium: str) -> Question:
    """Whether there is something, or whether a thing is as claimed; every second answer is yes."""
    yes = bool(rng.integers(2))
    name = pick(rng, ("", *(name for name in ATTRIBUTES if medium == "video" or name != "motion")))
    if not name:
        right = [thing.name for thing in scene.things]
        near = [f"the {a.colour} {b.shape}" for a in scene.things for b in scene.things]
        what = pick(rng, _claimed(rng, yes, right, near, NAMES)).removeprefix("the ")
        what = f"an {what}" if what.startswith("o") else f"a {what}"
        texts: tuple[str, ...] = f"is there {what}?", f"does the {medium} show {what}?"
    else:
        number, phrase = _one_of(rng, scene, medium, name)
        right = [getattr(scene.things[number], name)]
        near = [getattr(thing, name) for thing in scene.things]
        value = pick(rng, _claimed(rng, yes, right, near, ATTRIBUTES[name].values))
        words = {"value": value, "act": act(value), "acts": acts(value), "where": where(value)}
        texts = tuple(text.format(thing=phrase, **words) for text in ATTRIBUTES[name].claims)
    return Question(pick(rng, texts), YES_NO[not yes], YES_NO)


def _claimed(rng: Generator, yes: bool, right: list[str], near: list[str], values: Iterable[str]) -> list[str]:
    """What to claim: the truth, or something wrong, every second time such that the scene has parts of it."""
    if yes:
        return right
    wrong = [value for value in near if value not in right]
    return wrong if wrong and rng.integers(2) else [value for value in values if value not in right]


_ASK: dict[str, Callable[[Generator, Scene, str], Question | None]] = {
    "caption": _caption,
    **{name: partial(_attribute, name=name) for name in ATTRIBUTES},
    "background": _background,
    "light": _light,
    "count": _count,
    "which": _which,
    "whether": _whether,
}
QUESTIONS: dict[str, tuple[str, ...]] = {
    "und_img": tuple(kind for kind in _ASK if kind != "motion"),
    "und_vid": tuple(_ASK),
}
"""Kinds of questions of each understanding task; a kind asks nothing of a scene that has no single answer."""


def make_question(
    task: str,
    index: int,
    *,
    seed: int = 0,
    frames: int = 17,
    height: int = 64,
    width: int = 64,
    split: Split = "train",
    kinds: Sequence[str] | None = None,
) -> Conversation:
    """Make one understanding sample; as with `make_item`, it is a pure function of the arguments.

    Combinations for which `held_out` is true never occur in a train sample, and every held-out sample shows one.

    Args:
        task: ``und_img`` or ``und_vid``.
        index: Number of the sample, at least 0.
        seed: Seed of the world.
        frames: Frames of a clip; images have one.
        height: In pixels, at least 32.
        width: In pixels, at least 32.
        split: ``train`` or ``held_out``.
        kinds: Kinds of questions to choose from, see `QUESTIONS`; all that the task knows by default.

    Returns:
        The image or clip (pixels ``[3, T, height, width]`` uint8, clips at 16 fps), the question, and the answer: a
        text with loss. ``info["question"]`` has its ``kind``, ``answer``, ``choices`` (every answer that the kind can
        have; none for captions) and the ``scene`` that is shown.

    Raises:
        ConfigError: An argument is out of range, or the task does not know one of the kinds.
    """
    if task not in QUESTIONS:
        raise ConfigError(f"the toy world has no questions for task {task!r}", fix=f"use {' or '.join(QUESTIONS)}")
    possible = QUESTIONS[task]
    if kinds is not None and (not kinds or set(kinds) - set(possible)):
        raise ConfigError(
            f"the question kinds {list(kinds)} do not fit task {task}",
            where="kinds",
            why=f"the kinds of {task} are {', '.join(possible)}",
            fix="name one of these, or leave kinds out",
        )
    rng, medium = sample_rng(task, split, index, seed), "image" if task == "und_img" else "video"
    kind, question = pick(rng, kinds or possible), None
    while question is None:
        scene = replace(draw_scene(rng, moving=medium == "video"), lighting=pick(rng, LIGHTING))
        if Plan(scene, "").suits(split):
            question = _ASK[kind](rng, scene, medium)

    if medium == "video":
        shown = Message("video", media=Media(pixels=render(scene, frames, height, width), fps=FPS))
    else:
        shown = Message("image", media=Media(pixels=render(scene, 1, height, width)))
    facts = {"answer": question.answer, "choices": list(question.choices)}
    return Conversation(
        task,
        [shown, Message("text", question.text), Message("text", question.answer, has_loss=True)],
        key=f"{task}-{index:06d}",
        info={"question": {"kind": kind, **facts, "scene": scene.to_json()}},
    )

"""Samples of all twelve tasks, each a pure function of its arguments."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.random import Generator

from bernini.conversation import Conversation, Media, Message
from bernini.errors import ConfigError
from bernini.reasoning import PROPAGATE
from bernini.tasks import get_task
from datamodules.toyworld.edits import COUNTS, EDITS, UNSEEN, draw_scene, draw_thing, edit, pick
from datamodules.toyworld.reasoning import draw_reasoned
from datamodules.toyworld.render import render
from datamodules.toyworld.scene import COLOURS, CORNER, OPPOSITE, SHAPES, Scene, Thing, acts, caption, held_out

Split = Literal["train", "held_out"]
FPS = 16.0
MOST_REFERENCES = 5  # as many source ids as the released renderer was trained on


@dataclass(frozen=True)
class Plan:
    """A sample before it is drawn.

    Attributes:
        target: What is to be made.
        text: Prompt.
        videos: Source clips.
        images: Source images: the first frame of each scene.
        edit: Edit kind, if the task changes its first source.
        references: Things of the target (their numbers) that a source shows and the text does not describe.
        reason: Kind of reasoning, one of `REASONS`, if the edit takes some.
        explicit: The instruction that it leads to.
        thought: How it is led to, if that is to be learned.
    """

    target: Scene
    text: str
    videos: tuple[Scene, ...] = ()
    images: tuple[Scene, ...] = ()
    edit: str | None = None
    references: tuple[int, ...] = ()
    reason: str | None = None
    explicit: str | None = None
    thought: str | None = None

    def suits(self, split: Split) -> bool:
        """Whether names are unambiguous, an edit changes something, and the split allows every combination."""
        scenes = (self.target, *self.videos, *self.images)
        if any(len({thing.name for thing in scene.things}) < len(scene.things) for scene in scenes):
            return False
        portrayed = [scene.things[0].name for scene in self.images] if self.references else []
        if len(set(portrayed)) < len(portrayed):
            return False
        if self.edit and self.target == scenes[1]:
            return False
        if split == "held_out":
            return any(map(held_out, self.target.things))
        return not any(held_out(thing) for scene in scenes for thing in scene.things)

    def truth(self) -> dict[str, Any]:
        """What the verifier compares with, plain JSON."""
        return {
            "sources": [scene.to_json() for scene in (*self.videos, *self.images)],
            "target": self.target.to_json(),
            "edit": self.edit,
            "instruction": self.text,
            "references": list(self.references),
            **({"reason": self.reason} if self.reason else {}),
        }


def portrait(thing: Thing) -> Scene:
    """The thing alone, centred and still on a neutral background."""
    return Scene((replace(thing, motion="still", place="centre", x=0.0, y=0.0),), "gray")


def _from_text(rng: Generator, moving: bool) -> Plan:
    scene = draw_scene(rng, moving=moving)
    return Plan(scene, caption(scene, moving))


def _from_frame(rng: Generator) -> Plan:
    scene = draw_scene(rng)
    text = " and ".join(f"{thing.name} {acts(thing.motion)}" for thing in scene.things)
    return Plan(scene, text, images=(scene,))


def _from_references(rng: Generator, moving: bool, references: int | None) -> Plan:
    shown = references or int(rng.integers(1, MOST_REFERENCES + 1))
    scene = draw_scene(rng, (1, 2) if shown > 1 else (1,), moving=moving)
    # The other images show things that the text does not name: which image is meant is told by its number alone.
    others = [draw_thing(rng, "centre", moving=False) for _ in range(shown - len(scene.things))]
    order = rng.permutation(shown).tolist()
    pictures = [portrait([*scene.things, *others][number]) for number in order]
    names = [f"the thing of image{order.index(number)}" for number in range(len(scene.things))]
    text = caption(scene, moving, names)
    return Plan(scene, text, images=tuple(pictures), references=tuple(range(len(scene.things))))


def _source(rng: Generator, kind: str, moving: bool = True) -> Scene:
    # What is added needs a free place opposite; a logo needs a free corner.
    places = {"add": tuple(OPPOSITE), "insert": ("centre", "left", "top")}
    return draw_scene(rng, COUNTS.get(kind, (1, 2)), moving, **({"places": places[kind]} if kind in places else {}))


def _reasoned(rng: Generator, task: str, aloud: bool) -> Plan:
    found = draw_reasoned(rng, task != "i2i")
    plan = Plan(found.target, found.text, edit="reason", reason=found.kind, explicit=found.explicit)
    plan = replace(plan, thought=found.thought) if aloud else plan
    return replace(plan, images=(found.source,)) if task == "i2i" else replace(plan, videos=(found.source,))


def _edited(rng: Generator, task: str, kind: str) -> Plan:
    if kind in ("reason", "cot"):
        return _reasoned(rng, task, aloud=kind == "cot")
    scene = _source(rng, kind, task != "i2i")
    if kind == "lighting" and rng.integers(2):
        scene = replace(scene, lighting="dim")
    if task == "vrc2v" and rng.integers(2):
        target, text = edit(kind, scene, rng, name="the thing of image0")
        return Plan(target, text, (scene,), (portrait(scene.things[0]),), kind, (0,))
    target, text = edit(kind, scene, rng, task != "i2i")
    if task == "i2i":
        return Plan(target, text, images=(scene,), edit=kind)
    if task == "vi2v":
        return Plan(target, PROPAGATE, (scene,), (target,), kind)
    return Plan(target, text, (scene,), edit=kind)


def _replaced(rng: Generator) -> Plan:
    scene = draw_scene(rng)
    chosen = int(rng.integers(len(scene.things)))
    old = scene.things[chosen]
    look = draw_thing(rng, old.place, moving=False)
    new = replace(old, shape=look.shape, colour=look.colour, texture=look.texture)
    target = replace(scene, things=(*scene.things[:chosen], new, *scene.things[chosen + 1 :]))
    text = f"replace {old.name} by the thing of image0"
    return Plan(target, text, (scene,), (portrait(new),), "replace", (chosen,))


def _inserted(rng: Generator) -> Plan:
    scene, advert = _source(rng, "insert"), draw_scene(rng, (1,))
    logo = replace(advert.things[0], size="small", motion="still", place=CORNER, x=0.0, y=0.0)
    target = replace(scene, things=(*scene.things, logo))
    text = "insert the thing of video1 into video0 as a small still logo in the corner"
    return Plan(target, text, (scene, advert), edit="insert", references=(1,))


def _plan(rng: Generator, task: str, kinds: Sequence[str], references: int | None) -> Plan:
    if task in ("t2i", "t2v"):
        return _from_text(rng, task == "t2v")
    if task in ("r2i", "r2v"):
        return _from_references(rng, task == "r2v", references)
    if task == "i2v":
        return _from_frame(rng)
    if task == "rv2v":
        return _replaced(rng)
    if task == "ads2v":
        return _inserted(rng)
    return _edited(rng, task, pick(rng, kinds))


def _kinds(task: str, edits: Sequence[str] | None) -> Sequence[str]:
    possible = EDITS.get(task, ())
    if edits is None or len(possible) < 2:
        return possible
    possible += UNSEEN.get(task, ())
    kinds = [kind for kind in possible if kind in edits]
    if not kinds or set(edits) - {kind for table in (EDITS, UNSEEN) for kinds in table.values() for kind in kinds}:
        raise ConfigError(
            f"the edit kinds {list(edits)} do not fit task {task}",
            where="edits",
            why=f"the kinds of {task} are {', '.join(possible)}",
            fix="name one of these, or leave edits out",
        )
    return kinds


def sample_rng(task: str, split: Split, index: int, seed: int) -> Generator:
    """What draws a sample.

    Raises:
        ConfigError: There is no such sample.
    """
    if split not in get_args(Split) or index < 0:
        raise ConfigError(
            f"there is no sample {index} of split {split!r}",
            why=f"numbers start at 0 and the splits are {', '.join(get_args(Split))}",
        )
    digest = hashlib.sha256(f"{seed} {task} {split} {index}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def make_item(
    task: str,
    index: int,
    *,
    seed: int = 0,
    frames: int = 17,
    height: int = 64,
    width: int = 64,
    split: Split = "train",
    edits: Sequence[str] | None = None,
    references: int | None = None,
) -> Conversation:
    """Make one sample; the same arguments give the same sample, and size and length do not change its scenes.

    Combinations of colour, shape and motion for which `held_out` is true never occur in a train sample, and the target
    of every held-out sample shows one.

    Args:
        task: Name in the task table.
        index: Number of the sample, at least 0.
        seed: Seed of the world.
        frames: Frames of a clip; images have one.
        height: In pixels, at least 32.
        width: In pixels, at least 32.
        split: ``train`` or ``held_out``.
        edits: Edit kinds to choose from, for tasks that have a choice (see `EDITS` and `UNSEEN`); by default all of
            `EDITS`.
        references: Source images of r2i and r2v, of which the text names one or two; 1 to 5 by default.

    Returns:
        Source videos, source images, prompt, target, pixels ``[3, T, height, width]`` uint8, clips at 16 fps.
        ``info["truth"]`` is what `judge` compares with. A reasoning edit has ``info["explicit"]`` too, the instruction
        without any need to reason; of the kind ``cot`` it has the reasoning behind the prompt: ``cot_text`` with loss.

    Raises:
        ConfigError: An argument is out of range, or the task has none of the edit kinds.
    """
    spec = get_task(task)
    rng = sample_rng(spec.name, split, index, seed)
    if references is not None and not 1 <= references <= len(COLOURS) * len(SHAPES) // 2:
        raise ConfigError(f"{references} reference images", why="there are 1 or more, each of another colour or shape")
    kinds = _kinds(spec.name, edits)
    plan = _plan(rng, spec.name, kinds, references)
    while not plan.suits(split):
        plan = _plan(rng, spec.name, kinds, references)

    def clip(scene: Scene) -> Media:
        return Media(pixels=render(scene, frames, height, width), fps=FPS)

    def image(scene: Scene) -> Media:
        return Media(pixels=render(scene, 1, height, width))

    messages = [Message("video", media=clip(scene)) for scene in plan.videos]
    messages += [Message("image", media=image(scene)) for scene in plan.images]
    messages.append(Message("text", plan.text))
    if plan.thought:
        messages.append(Message("cot_text", plan.thought, has_loss=True))
    if spec.target == "image":
        messages.append(Message("image_gen", media=image(plan.target)))
    else:
        messages.append(Message("video_gen", media=clip(plan.target)))
    info = {"truth": plan.truth(), **({"explicit": plan.explicit} if plan.explicit else {})}
    return Conversation(spec.name, messages, key=f"{spec.name}-{index:06d}", info=info)


def items(
    tasks: Sequence[str] | Mapping[str, float],
    count: int,
    *,
    seed: int = 0,
    frames: int = 17,
    height: int = 64,
    width: int = 64,
    split: Split = "train",
    edits: Sequence[str] | None = None,
    references: int | None = None,
) -> Iterator[Conversation]:
    """Samples of a mix of tasks, in an order that depends on nothing but the arguments.

    Args:
        tasks: Task names, in equal parts, or parts by task name. Each sample goes to the task that lags
            furthest behind its part.
        count: Number of samples; they are numbered from 0.
        seed: See `make_item`, as for the arguments below.
        frames: See there.
        height: See there.
        width: See there.
        split: See there.
        edits: See there; tasks without a choice are left as they are.
        references: See there.

    Raises:
        ConfigError: No task has a positive part, a part is negative, or an argument does not suit `make_item`.
    """
    parts = dict(tasks) if isinstance(tasks, Mapping) else dict.fromkeys(tasks, 1.0)
    total = sum(parts.values())
    if not total > 0 or min(parts.values()) < 0:
        raise ConfigError(
            f"no mix can be made of {parts}", where="tasks", why="parts are at least 0 and one is above 0"
        )
    given = dict.fromkeys(parts, 0)
    for index in range(count):
        task = max(parts, key=lambda name: parts[name] / total * (index + 1) - given[name])
        given[task] += 1
        yield make_item(
            task,
            index,
            seed=seed,
            frames=frames,
            height=height,
            width=width,
            split=split,
            edits=edits,
            references=references,
        )

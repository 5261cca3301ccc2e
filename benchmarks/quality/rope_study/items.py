"""The study's held-out items, and what the verifier reads from an output; processes that read import this file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from bernini.conversation import Conversation
from bernini.renderer.sampling import BeyondTrained
from datamodules.toyworld import Scene, Thing, judge, make_item, read

TASK = "r2v"
TRAINED = (1, 2, 3, 4, 5)
COMPARED, BEYOND = (1, 2, 4), (6, 8, 10)
NUMBERINGS: dict[str, BeyondTrained] = {"integer": "extend", "fractional": "interpolate"}
WORLD = 1000  # seed of the held-out items, apart from the seeds of runs

Record = dict[str, Any]


def settings(encoding: str) -> list[tuple[int, str]]:
    """Numbers of references, each with the numberings that make a difference to the encoding."""
    beyond = ["integer"] if encoding == "plain" else list(NUMBERINGS)
    return [*((k, "integer") for k in COMPARED), *((k, numbering) for k in BEYOND for numbering in beyond)]


@dataclass(frozen=True)
class Clips:
    """Size of the clips.

    Attributes:
        frames: Frames of a target, 4k + 1.
        height: In pixels.
        width: In pixels.
    """

    frames: int = 9
    height: int = 64
    width: int = 64


@cache  # all runs are scored on the same items
def held_out(clips: Clips, references: int, index: int) -> Conversation:
    """Held-out item ``index`` among those with so many reference images."""
    return make_item(
        TASK,
        index,
        seed=WORLD,
        frames=clips.frames,
        height=clips.height,
        width=clips.width,
        split="held_out",
        references=references,
    )


def _looks(thing: Thing) -> tuple[str, str, str]:
    return thing.shape, thing.colour, thing.texture


def _agreement(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of the wanted looks that were found."""
    return sum(a == b for a, b in zip(found, wanted, strict=False)) / len(wanted)


def read_output(item: Conversation, output: Tensor) -> Record:
    """Score one output.

    Args:
        item: A subject-to-video item of the toy world; its key and truth are enough.
        output: ``[3, T, H, W]`` uint8.

    Returns:
        ``in_place``, the share right of shape, colour and texture of what is seen at the place of each thing that an
        image shows: the verifier's own ``identity`` lets two things swap places. ``chance``, what ``in_place`` would be
        on average if each thing came from any of the images alike. ``copied``, the share of things that look like one
        of the images, whichever. ``named``, the numbers of the images in the text. The verifier's ``identity``,
        ``attributes`` and ``motion``.
    """
    truth = item.info["truth"]
    wanted = Scene.from_json(truth["target"]).things
    shown = [_looks(Scene.from_json(row).things[0]) for row in truth["sources"]]
    seen = read(output).scene.things[: len(wanted)]
    at_place = {thing.place: _looks(thing) for thing in seen}
    right = [_agreement(at_place.get(thing.place, ()), _looks(thing)) for thing in wanted]
    by_chance = [_agreement(look, _looks(thing)) for thing in wanted for look in shown]
    scores = judge(item, output)
    return {
        "key": item.key,
        "named": [int(number) for number in re.findall(r"image(\d+)", truth["instruction"])],
        "in_place": sum(right) / len(right),
        "chance": sum(by_chance) / len(by_chance),
        "copied": sum(_looks(thing) in shown for thing in seen) / len(wanted),
        **{name: scores[name] for name in ("identity", "attributes", "motion")},
    }

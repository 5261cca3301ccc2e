"""The toy world: moving shapes for all twelve tasks, questions about them, and a verifier that scores exactly."""

from datamodules.toyworld.edits import EDITS
from datamodules.toyworld.items import items, make_item
from datamodules.toyworld.questions import make_question
from datamodules.toyworld.reading import Reading, read
from datamodules.toyworld.render import render
from datamodules.toyworld.scene import Scene, Thing, caption, held_out
from datamodules.toyworld.verifier import judge

__all__ = [
    "EDITS",
    "Reading",
    "Scene",
    "Thing",
    "caption",
    "held_out",
    "items",
    "judge",
    "make_item",
    "make_question",
    "read",
    "render",
]

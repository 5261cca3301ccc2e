"""The toy world: clips of shapes that move, for all twelve tasks, and a verifier that scores outputs exactly."""

from datamodules.toyworld.edits import EDITS
from datamodules.toyworld.items import items, make_item
from datamodules.toyworld.reading import Reading, read
from datamodules.toyworld.render import render
from datamodules.toyworld.scene import Scene, Thing, caption, held_out
from datamodules.toyworld.verifier import judge

__all__ = ["EDITS", "Reading", "Scene", "Thing", "caption", "held_out", "items", "judge", "make_item", "read", "render"]

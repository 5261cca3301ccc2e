"""What a score that a model gives is made of, and the models that several benchmarks measure with."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.quality.interface import Item
from benchmarks.quality.metrics.encoders import Clip, Dino, Dinov2, Rated
from benchmarks.quality.metrics.packaged import Lpips, Musiq, Niqe
from benchmarks.quality.metrics.preparing import CLIP, Preparation
from benchmarks.quality.official.base import OfficialBenchmark

PILLOW_CLIP = Preparation(224, "bicubic", "pillow", crop=224, colours=CLIP)
"""As the package of CLIP's authors prepares an image."""


class Measure(NamedTuple):
    """A score that a model gives.

    Attributes:
        model: Loads the model, from where the weights lie that the score needs, in their order.
        score: The score of an output ``[3, T, H, W]`` uint8; none where by its definition there is none.
    """

    model: Callable[[Sequence[Path], torch.device], Any]
    score: Callable[[Any, OfficialBenchmark, Item, Tensor], float | None]


def clip(places: Sequence[Path], device: torch.device) -> Clip:
    """A CLIP; a second place has its processor and tokenizer."""
    return Clip(places[0], device, *places[1:])


def rated(places: Sequence[Path], device: torch.device) -> Rated:
    """A CLIP with a head that rates."""
    folder, head = places
    return Rated(folder, head, device)


def dino(places: Sequence[Path], device: torch.device) -> Dino:
    """A DINO."""
    return Dino(places[0], device)


def dinov2(places: Sequence[Path], device: torch.device) -> Dinov2:
    """A DINOv2."""
    return Dinov2(places[0], device)


def musiq(places: Sequence[Path], device: torch.device) -> Musiq:
    """A MUSIQ."""
    return Musiq(places[0], device)


def niqe(places: Sequence[Path], device: torch.device) -> Niqe:
    """A NIQE."""
    return Niqe(places[0], device)


def lpips(places: Sequence[Path], device: torch.device) -> Lpips:
    """An LPIPS."""
    return Lpips(places[0], device)

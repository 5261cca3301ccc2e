"""OpenS2V-Eval: aesthetics. Source: OpenS2V-Nexus, `eval/get_aesscore.py`, version 1.1."""

from torch import Tensor

from benchmarks.quality.interface import Item
from benchmarks.quality.metrics.encoders import Rated
from benchmarks.quality.metrics.frames import evenly
from benchmarks.quality.metrics.preparing import pictures
from benchmarks.quality.models.base import Measure, rated
from benchmarks.quality.official.base import OfficialBenchmark


def aesthetics(model: Rated, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """Mean rating of 32 frames, about 1 to 10."""
    frames = pictures(pixels[:, evenly(pixels.shape[1])])
    return model.ratings(model.shown(frames)).mean().item()


OPENS2V = {"aesthetics": Measure(rated, aesthetics)}

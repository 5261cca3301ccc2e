"""IVEBench: VBench's consistency, of frames that are resized as images.

Source: RyanChenYN/IVEBench, `quality/subject_consistency.py` and `quality/background_consistency.py`.
"""

from torch import Tensor

from benchmarks.quality.interface import Item
from benchmarks.quality.metrics.encoders import Clip, Dino
from benchmarks.quality.metrics.likeness import consistency
from benchmarks.quality.metrics.preparing import Preparation
from benchmarks.quality.models.base import PILLOW_CLIP, Measure, clip, dino
from benchmarks.quality.official.base import OfficialBenchmark

FOR_DINO = Preparation(224, "bilinear", "pillow")


def subject(model: Dino, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """DINO's consistency."""
    return consistency(model.features(FOR_DINO(pixels)))


def background(model: Clip, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """CLIP's consistency."""
    return consistency(model.images(PILLOW_CLIP(pixels)))


IVEBENCH = {"SC": Measure(dino, subject), "BC": Measure(clip, background)}

"""EditVerseBench: frames beside their neighbours and beside the target prompt, by the published processors.

Source: adobe-research/EditVerse, `automatic_evaluation/`.
"""

from torch import Tensor

from benchmarks.quality.interface import Item
from benchmarks.quality.metrics.encoders import Clip, Dinov2
from benchmarks.quality.metrics.likeness import adjacent, cosines
from benchmarks.quality.metrics.preparing import pictures
from benchmarks.quality.models.base import Measure, clip, dinov2
from benchmarks.quality.official.base import OfficialBenchmark

PICK_EDGE = 672  # longest edge of a frame that PickScore is shown


def neighbours(model: Clip, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """CLIP's likeness of neighbours, before features are projected (`clip_temporal_consistency.py`)."""
    return adjacent(model.pooled(model.shown(pictures(pixels))))


def neighbours_dino(model: Dinov2, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """DINOv2's likeness of neighbours (`dino_temporal_consistency.py`)."""
    return adjacent(model.features(pixels))


def text(model: Clip, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """Mean logit of frames and the target prompt (`frame_text_alignment.py`)."""
    return _logit(model, item, model.shown(pictures(pixels)))


def pick(model: Clip, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """The same by PickScore, of frames that were shrunk before (`pick_score_video_quality.py`)."""
    frames, longest = pictures(pixels), max(pixels.shape[2:])
    if longest > PICK_EDGE:
        height, width = (int(PICK_EDGE / longest * edge) for edge in pixels.shape[2:])
        frames = [frame.resize((width, height)) for frame in frames]
    return _logit(model, item, model.shown(frames))


def _logit(model: Clip, item: Item, frames: Tensor) -> float:
    found = cosines(model.images(frames), model.text(item.extra["target_prompt"]))
    return model.scale * found.mean().item()


EDITVERSE = {
    "pick": Measure(clip, pick),
    "frame_text": Measure(clip, text),
    "clip_tc": Measure(clip, neighbours),
    "dino_tc": Measure(dinov2, neighbours_dino),
}

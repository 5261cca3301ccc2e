"""FiVE: structure by DINO, LPIPS, NIQE, and frames beside the target prompt by CLIP, on every eighth frame.

Outputs are resized to the size of the source's frames. Source: FiVE-Bench, `evaluation/evaluate.py` and
`metrics_calculator.py`.
"""

import numpy as np
from torch import Tensor

from benchmarks.quality.interface import Item
from benchmarks.quality.metrics.encoders import Clip, Dino
from benchmarks.quality.metrics.frames import five_compared
from benchmarks.quality.metrics.likeness import cosines, structure_distance
from benchmarks.quality.metrics.packaged import Lpips, Niqe
from benchmarks.quality.metrics.preparing import Preparation, pictures
from benchmarks.quality.models.base import Measure, clip, dino, lpips, niqe
from benchmarks.quality.official import five
from benchmarks.quality.official.base import OfficialBenchmark

FOR_DINO = Preparation(224, "bilinear", "torch_antialias", longest=480, scale=1.0)
"""Levels up to 255 are normalised as if they were up to 1."""


def structure(model: Dino, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """Mean structure distance of frames from the source's."""
    source = five.frames(benchmark.folder, item)
    pairs = zip(*(model.keys(FOR_DINO(one)) for one in (five.beside(pixels, source), source)), strict=True)
    return float(np.mean([structure_distance(a, b) for a, b in pairs]))


def whole(model: Clip, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """Mean CLIP score of frames and the target prompt, in [0, 100]."""
    return _similarity(model, item, five.beside(pixels, five.frames(benchmark.folder, item)))


def edited(model: Clip, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float | None:
    """The same of frames that are black outside the mask; frames without a mask do not count."""
    source = five.frames(benchmark.folder, item)
    masks = five.masks(benchmark.folder, item, source)
    kept = masks.flatten(1).any(1)
    return _similarity(model, item, (five.beside(pixels, source) * masks)[:, kept]) if kept.any() else None


def background(model: Lpips, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float | None:
    """Mean LPIPS of frames that are black within the mask; frames that are all mask do not count."""
    source = five.frames(benchmark.folder, item)
    outside = ~five.masks(benchmark.folder, item, source)
    pair = [one.float() / 255 * outside * 2 - 1 for one in (five.beside(pixels, source), source)]
    found = [model.distance(*(one[:, t] for one in pair)) for t in range(len(outside)) if outside[t].any()]
    return float(np.mean(found)) if found else None


def naturalness(model: Niqe, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """Mean NIQE of frames in their own size."""
    taken = five_compared(pixels.shape[1])[: len(five.compared(benchmark.folder, item))]
    return model.distance(pixels[:, taken].permute(1, 0, 2, 3).float() / 255)


def _similarity(model: Clip, item: Item, frames: Tensor) -> float:
    text = model.text(item.extra["target_prompt"], ends=False)
    return 100 * cosines(model.images(model.shown(pictures(frames))), text).clamp(min=0).mean().item()


FIVE = {
    "structure_distance": Measure(dino, structure),
    "lpips_unedit_part": Measure(lpips, background),
    "niqe_target_image": Measure(niqe, naturalness),
    "clip_similarity_target_image": Measure(clip, whole),
    "clip_similarity_target_image_edit_part": Measure(clip, edited),
}

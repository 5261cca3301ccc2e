"""FiVE: structure by DINO, LPIPS, NIQE, and frames beside the target prompt by CLIP, on every eighth frame.

Outputs are resized to the size of the source's frames. Source: FiVE-Bench, `evaluation/evaluate.py` and
`metrics_calculator.py`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.quality.interface import Item
from benchmarks.quality.metrics.encoders import Clip, Dino
from benchmarks.quality.metrics.frames import five_compared
from benchmarks.quality.metrics.likeness import cosines, structure_distance
from benchmarks.quality.metrics.packaged import Lpips, Niqe
from benchmarks.quality.metrics.preparing import Preparation, pictures
from benchmarks.quality.models.base import Measure, clip, dino, lpips, niqe
from benchmarks.quality.official.base import OfficialBenchmark
from bernini.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png")
FOR_DINO = Preparation(224, "bilinear", "torch_antialias", longest=480, scale=1.0)
"""Levels up to 255 are normalised as if they were up to 1."""


def structure(model: Dino, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """Mean structure distance of frames from the source's."""
    files = _files(benchmark.folder / item.extra["frames"], pixels)
    outputs = model.keys(FOR_DINO(_clip(_frames(pixels, files))))
    sources = model.keys(FOR_DINO(_clip([_opened(file) for file in files])))
    return float(np.mean([structure_distance(a, b) for a, b in zip(outputs, sources, strict=True)]))


def whole(model: Clip, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """Mean CLIP score of frames and the target prompt, in [0, 100]."""
    files = _files(benchmark.folder / item.extra["frames"], pixels)
    return _similarity(model, item, _frames(pixels, files))


def edited(model: Clip, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float | None:
    """The same of frames that are black outside the mask; frames without a mask do not count."""
    files = _files(benchmark.folder / item.extra["frames"], pixels)
    masks = [_mask(benchmark.folder / item.extra["masks"] / file.name, file) for file in files]
    kept = [
        Image.fromarray(np.asarray(frame) * mask[:, :, None].astype(np.uint8))
        for frame, mask in zip(_frames(pixels, files), masks, strict=True)
        if mask.any()
    ]
    return _similarity(model, item, kept) if kept else None


def background(model: Lpips, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float | None:
    """Mean LPIPS of frames that are black within the mask; frames that are all mask do not count."""
    files = _files(benchmark.folder / item.extra["frames"], pixels)
    found = []
    for frame, file in zip(_frames(pixels, files), files, strict=True):
        outside = torch.from_numpy(~_mask(benchmark.folder / item.extra["masks"] / file.name, file))
        if outside.any():
            pair = (_clip([image])[:, 0].float() / 255 * outside * 2 - 1 for image in (frame, _opened(file)))
            found.append(model.distance(*pair))
    return float(np.mean(found)) if found else None


def naturalness(model: Niqe, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """Mean NIQE of frames in their own size."""
    files = _files(benchmark.folder / item.extra["frames"], pixels)
    taken = five_compared(pixels.shape[1])[: len(files)]
    return model.distance(pixels[:, taken].permute(1, 0, 2, 3).float() / 255)


def _similarity(model: Clip, item: Item, frames: Sequence[Image.Image]) -> float:
    text = model.text(item.extra["target_prompt"], ends=False)
    return 100 * cosines(model.images(model.shown(frames)), text).clamp(min=0).mean().item()


def _files(folder: Path, pixels: Tensor) -> list[Path]:
    """Frames of the source that are compared: as many as the output has."""
    every = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if not every:
        raise DataError("there is no frame of the source", where=str(folder), fix="unpack images.zip")
    return [every[t] for t in five_compared(min(len(every), pixels.shape[1]))]


def _frames(pixels: Tensor, files: Sequence[Path]) -> list[Image.Image]:
    """Frames of the output that are compared, in the size of the source's."""
    size = _opened(files[0]).size
    taken = five_compared(pixels.shape[1])[: len(files)]
    return [frame.resize(size) for frame in pictures(pixels[:, taken])]


def _mask(path: Path, frame: Path) -> NDArray[np.bool_]:
    """Where a frame is edited, ``[H, W]``."""
    mask = np.asarray(Image.open(path).convert("L")) > 0
    if mask.shape[::-1] != _opened(frame).size:
        raise DataError(f"a mask is {mask.shape}", where=str(path), why="it is as large as its frame")
    return mask


def _opened(file: Path) -> Image.Image:
    return Image.open(file).convert("RGB")


def _clip(frames: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(frame) for frame in frames], 1)).permute(3, 1, 0, 2)


FIVE = {
    "structure_distance": Measure(dino, structure),
    "lpips_unedit_part": Measure(lpips, background),
    "niqe_target_image": Measure(niqe, naturalness),
    "clip_similarity_target_image": Measure(clip, whole),
    "clip_similarity_target_image_edit_part": Measure(clip, edited),
}

"""How frames become what a model is shown, where a benchmark's own script resizes, crops and normalises them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.quality.metrics.clips import check_clip

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Colours = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True)
class Preparation:
    """Resizing, cropping and normalising, to the pixel as torchvision does it.

    Attributes:
        edge: Shorter edge after resizing.
        mode: Interpolation.
        by: ``pillow`` resizes 8-bit images, which rounds; ``torch`` resizes floats, and ``torch_antialias`` smooths
            what shrinks, too.
        crop: Edge of the square that is cut from the middle; 0 cuts nothing.
        longest: Longest edge after resizing, whatever becomes of the shorter; 0 for any.
        colours: Mean and standard deviation that pixels are normalised with.
        scale: What pixels are divided by before.
    """

    edge: int
    mode: Literal["bilinear", "bicubic"]
    by: Literal["pillow", "torch", "torch_antialias"]
    crop: int = 0
    longest: int = 0
    colours: Colours = IMAGENET
    scale: float = 255.0

    def __call__(self, clip: Tensor) -> Tensor:
        """Frames ``[3, T, H, W]`` uint8 as ``[T, 3, h, w]`` float32.

        Raises:
            DataError: It is no such clip.
        """
        check_clip(clip)
        height, width = self._size(*clip.shape[2:])
        if self.by == "pillow":
            resample = Image.Resampling.BICUBIC if self.mode == "bicubic" else Image.Resampling.BILINEAR
            frames = by_pillow(clip, height, width, resample).permute(1, 0, 2, 3).float()
        else:
            frames = interpolate(
                clip.permute(1, 0, 2, 3).float(),
                (height, width),
                mode=self.mode,
                align_corners=False,
                antialias=self.by == "torch_antialias",
            )
        if self.crop:
            top, left = round((height - self.crop) / 2), round((width - self.crop) / 2)
            frames = frames[:, :, top : top + self.crop, left : left + self.crop]
        mean, deviation = (torch.tensor(values)[:, None, None] for values in self.colours)
        return (frames / self.scale - mean) / deviation

    def _size(self, height: int, width: int) -> tuple[int, int]:
        short, long = sorted((height, width))
        edges = self.edge, int(self.edge * long / short)
        if self.longest and edges[1] > self.longest:
            edges = int(self.longest * edges[0] / edges[1]), self.longest
        return edges if height <= width else (edges[1], edges[0])


def by_pillow(clip: Tensor, height: int, width: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Tensor:
    """Frames ``[3, T, H, W]`` uint8 as ``[3, T, height, width]``, resized as images."""
    resized = [np.asarray(frame.resize((width, height), resample)) for frame in pictures(clip)]
    return torch.from_numpy(np.stack(resized, 1)).permute(3, 1, 0, 2)


def pictures(clip: Tensor) -> list[Image.Image]:
    """Frames of ``[3, T, H, W]`` uint8 as Pillow's images."""
    return [Image.fromarray(frame) for frame in clip.permute(1, 2, 3, 0).contiguous().numpy()]

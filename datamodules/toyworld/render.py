"""From a scene to pixels."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bernini.errors import ConfigError
from datamodules.toyworld.scene import BACKGROUNDS, COLOURS, DARK_TONE, LIGHTING, SIZES, Scene, Thing, path

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]
SAMPLES = 4  # per pixel and axis; `coverage` packs four of them in a word
LEAST = 32


def _triangle(u: Floats, v: Floats) -> Bools:
    # Its centroid is the origin: the verifier finds things by their centroid.
    return (v < 0.6) & (v > 1.75 * np.abs(u) - 1.15)


_INSIDE: dict[str, Callable[[Floats, Floats], Bools]] = {
    "circle": lambda u, v: u * u + v * v < 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.85,
    "triangle": _triangle,
    "diamond": lambda u, v: np.abs(u) + np.abs(v) < 1,
    "ring": lambda u, v: np.abs(u * u + v * v - 0.65) < 0.35,
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < 0.32) & (np.maximum(np.abs(u), np.abs(v)) < 1),
}
_LIGHT: dict[str, Callable[[Floats, Floats], Bools]] = {
    "striped": lambda u, v: np.floor((v + 1) * 2.5) % 2 == 0,
    "checkered": lambda u, v: (np.floor(u * 2) + np.floor(v * 2)) % 2 == 0,
}


def coverage(
    shape: str, texture: str, radius: float, x: Floats, y: Floats, height: int, width: int
) -> tuple[Floats, Floats]:
    """How much of each pixel a thing covers, by 4 x 4 samples a pixel.

    Args:
        shape: One of `SHAPES`.
        texture: One of `TEXTURES`.
        radius: In pixels.
        x: Centres, ``[N]``, in pixels.
        y: Centres, ``[N]``, in pixels.
        height: Of the patch in pixels.
        width: Of the patch in pixels.

    Returns:
        Share of each pixel inside the shape, and share in its light tone, each ``[N, height, width]`` in [0, 1].
    """
    columns, rows = ((np.arange(n * SAMPLES, dtype=np.float32) + 0.5) / SAMPLES for n in (width, height))
    u = ((columns - x.astype(np.float32)[:, None]) / np.float32(radius))[:, None, :]
    v = ((rows - y.astype(np.float32)[:, None]) / np.float32(radius))[:, :, None]

    def shares(mask: Bools) -> Floats:
        # The four samples of a row lie in one 32-bit word: rows add up bytewise, the product sums the bytes.
        words = mask.view(np.uint32).reshape(len(x), height, SAMPLES, width)
        sums = words[:, :, 0] + words[:, :, 1] + words[:, :, 2] + words[:, :, 3]
        return ((sums * np.uint32(0x01010101)) >> 24).astype(np.float32) / SAMPLES**2

    inside = _INSIDE[shape](u, v)
    covered = shares(inside)
    return covered, covered if texture == "plain" else shares(inside & _LIGHT[texture](u, v))


def backdrop(background: str, height: int) -> Floats:
    """Colours of the background's rows, ``[height, 3]`` in 0..255."""
    top, bottom = np.asarray(BACKGROUNDS[background], np.float32)
    share = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
    return top + (bottom - top) * share


def _paint(clip: Floats, thing: Thing) -> None:
    frames, height, width, _ = clip.shape
    centres = np.asarray(path(thing, np.linspace(0, 1, frames).tolist(), height, width))
    if thing.motion == "still":
        centres = centres[:1]
    radius = SIZES[thing.size] * min(height, width)
    side = int(np.ceil(2 * radius)) + 2
    corners = np.floor(centres - radius).astype(int)
    x, y = (centres - corners).astype(np.float32).T
    covered, light = coverage(thing.shape, thing.texture, radius, x, y, side, side)
    colour = np.asarray(COLOURS[thing.colour], np.float32)
    paint = (light + DARK_TONE * (covered - light))[..., None] * colour
    keep = 1 - covered[..., None]
    for frame in range(frames):
        i = min(frame, len(centres) - 1)
        left, top = corners[i]
        patch = clip[frame, max(top, 0) : top + side, max(left, 0) : left + side]
        cut = (slice(max(-top, 0), max(-top, 0) + patch.shape[0]), slice(max(-left, 0), max(-left, 0) + patch.shape[1]))
        patch *= keep[i][cut]
        patch += paint[i][cut]


def render(scene: Scene, frames: int = 17, height: int = 64, width: int = 64) -> Tensor:
    """Draw a clip.

    Args:
        scene: What to draw.
        frames: Number of frames; one frame is the clip's first.
        height: In pixels, at least 32.
        width: In pixels, at least 32.

    Returns:
        ``[3, frames, height, width]`` uint8.

    Raises:
        ConfigError: There is no frame, or the frame is smaller than 32 pixels.
    """
    if frames < 1 or min(height, width) < LEAST:
        raise ConfigError(
            f"a toy clip cannot have {frames} frame(s) of {height} x {width} pixels",
            why=f"it needs at least 1 frame and {LEAST} pixels a side for its shapes to be told apart",
            fix="raise frames, height or width",
        )
    clip = np.empty((frames, height, width, 3), np.float32)
    clip[:] = backdrop(scene.background, height)[:, None]
    for thing in scene.things:
        _paint(clip, thing)
    pixels = (clip * LIGHTING[scene.lighting] + 0.5).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)))

"""Reading a clip: what is in it, from its pixels alone.

The background is fitted to the frame's left and right border, which no thing touches. Pixels that differ from it at
any time are grouped into regions, one per thing, since things keep apart. A thing's frames are averaged around its
centroid and compared with every shape, texture, size and sharpness; the best fit in least squares gives the colour too.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, pad

from bernini.errors import DataError
from datamodules.toyworld.render import backdrop, coverage
from datamodules.toyworld.scene import (
    BACKGROUNDS,
    COLOURS,
    CORNER,
    DARK_TONE,
    LIGHTING,
    MARGIN,
    MOTIONS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
)

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

SIDE = 64  # larger clips are reduced to this short side
MOST = 4  # things that are read, the largest ones
LEAST_AREA = 0.012  # of a thing, in squared short sides; a small ring has 0.027
LEAST_TRAVEL = 0.045  # that counts as motion, in short sides; the shortest true one is 0.09
SHARPNESS = (0.5, 1.1)  # standard deviations in pixels of the templates' blur


@dataclass(frozen=True)
class Reading:
    """What was seen.

    Attributes:
        scene: Things, the one that sweeps over most pixels first, background and light; offsets inside a cell are not
            read.
        tracks: One ``[T, 2]`` array per thing: (x, y) of its centre in shares of width and height, NaN where it is not
            seen.
        fits: One number per thing in [0, 1]: the share of its contrast that the best template explains.
    """

    scene: Scene
    tracks: tuple[Floats, ...]
    fits: tuple[float, ...]


def _frames(clip: Tensor) -> Floats:
    """The clip as ``[T, H, W, 3]`` in 0..255, its short side at most `SIDE`."""
    if clip.ndim != 4 or clip.shape[0] != 3 or 0 in clip.shape:
        raise DataError(
            f"a clip has the shape {list(clip.shape)}", why="it is read as [3, T, H, W]", fix="pass one clip at a time"
        )
    pixels = clip.detach().cpu().float()
    if not pixels.isfinite().all():
        raise DataError(
            "a clip has values that are not finite", why="they are no pixels", fix="look for a diverged model"
        )
    if clip.is_floating_point():
        pixels = (pixels.clamp(-1, 1) + 1) * 127.5
    pixels = pixels.transpose(0, 1)
    height, width = pixels.shape[-2:]
    if min(height, width) > SIDE:
        scale = SIDE / min(height, width)
        size = (round(height * scale), round(width * scale))
        pixels = interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _fit_backdrop(clip: Floats) -> Floats:
    """Colour of the background in every row, ``[H, 3]``: a line through the medians of the border's pixels."""
    height, width = clip.shape[1:3]
    border = max(1, round(MARGIN * min(height, width)))
    sides = np.concatenate([clip[:, :, :border], clip[:, :, -border:]], axis=2)
    medians = np.median(sides, axis=(0, 2))
    rows = np.stack([np.ones(height), np.linspace(-1, 1, height)], axis=1)
    return (rows @ np.linalg.lstsq(rows, medians, rcond=None)[0]).astype(np.float32)


def _name_backdrop(rows: Floats, lightings: tuple[str, ...]) -> tuple[str, str]:
    """Background and light whose rows are nearest."""
    return min(
        ((name, lighting) for lighting in lightings for name in BACKGROUNDS),
        key=lambda pair: float(np.square(backdrop(pair[0], len(rows)) * LIGHTING[pair[1]] - rows).sum()),
    )


def _foreground(difference: Floats) -> Bools:
    """Where a clip ``[T, H, W, 3]`` less its background is not noise, ``[T, H, W]``."""
    distance = torch.from_numpy(difference).square().sum(-1).sqrt()[:, None]
    smooth = avg_pool2d(pad(distance, (1, 1, 1, 1), mode="replicate"), 3, 1)[:, 0]
    contrast = smooth - smooth.median()  # most of a frame is background: its median is the noise
    # The weakest contrast of a true thing is 45 (white on beige in dim light), of a second tone 36 (green on black).
    return (contrast > (0.2 * contrast.max()).clamp(10, 30)).numpy()


def _regions(foreground: Bools) -> list[Bools]:
    """Masks ``[H, W]`` of what each thing sweeps over, the largest first."""
    swept = torch.from_numpy(foreground.any(0))[None, None].float()
    labels = swept * torch.arange(1, swept.numel() + 1, dtype=torch.float32).reshape(swept.shape)
    while True:  # the largest label of a connected region spreads over it
        spread = max_pool2d(labels, 3, 1, 1) * swept
        if torch.equal(spread, labels):
            break
        labels = spread
    found = labels[0, 0].numpy()
    least = LEAST_AREA * min(found.shape) ** 2
    regions: list[Bools] = []
    for label, area in sorted(
        zip(*np.unique(found[found > 0], return_counts=True), strict=True), key=lambda row: -row[1]
    ):
        if area < least:
            break
        region = found == label
        # In few frames a fast thing leaves separate marks: regions that are never seen together are one thing.
        seen = (foreground & region).any((1, 2))
        for i, other in enumerate(regions):
            if not (seen & (foreground & other).any((1, 2))).any():
                regions[i] = other | region
                break
        else:
            regions.append(region)
    return regions[:MOST]


def _centroids(masks: Bools) -> Floats:
    """Centroid (x, y) in pixels of each mask of ``[T, H, W]``, NaN where a mask holds too little."""
    height, width = masks.shape[1:]
    areas = masks.sum((1, 2)).astype(np.float32)
    areas[areas < 0.5 * LEAST_AREA * min(height, width) ** 2] = np.nan
    x = masks.sum(1) @ (np.arange(width) + 0.5) / areas
    y = masks.sum(2) @ (np.arange(height) + 0.5) / areas
    return np.stack([x, y], axis=1).astype(np.float32)


def _aligned(images: Floats, centres: Floats, side: int) -> Floats:
    """Mean over frames of the patches ``[side, side, C]`` of ``[T, H, W, C]`` around the centres, bilinear."""
    seen = ~np.isnan(centres[:, 0])
    images, centres = images[seen], centres[seen]
    reach = side // 2 + 2
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    total = np.zeros((side, side, images.shape[-1]), np.float32)
    for image, centre in zip(padded, centres, strict=True):
        (left, top), (fx, fy) = np.divmod(centre - side / 2 + reach, 1)
        block = image[int(top) : int(top) + side + 1, int(left) : int(left) + side + 1]
        rows = block[:-1] * (1 - fy) + block[1:] * fy
        total += rows[:, :-1] * (1 - fx) + rows[:, 1:] * fx
    return total / max(len(images), 1)


@dataclass(frozen=True)
class _Bank:
    """Templates of one resolution: ``covered`` and ``paint``, ``[N, side * side]``, and what each shows."""

    side: int
    kinds: tuple[tuple[str, str, str], ...]
    covered: Floats
    paint: Floats


def _blur(images: Floats, sigma: float) -> Floats:
    taps = np.exp(-0.5 * np.square(np.arange(-3, 4) / sigma))
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (1, 2):
        wide = np.pad(images, [(3, 3) if i == axis else (0, 0) for i in range(3)])
        images = sum(tap * wide.take(np.arange(i, i + images.shape[axis]), axis) for i, tap in enumerate(taps))
    return images


@lru_cache(maxsize=8)
def _bank(unit: int) -> _Bank:
    """Every shape, texture, size and sharpness, at nine offsets around the centre, for a short side in pixels."""
    side = 2 * int(np.ceil(max(SIZES.values()) * unit)) + 5
    steps = np.repeat(np.array([-0.6, 0.0, 0.6], np.float32), 3), np.tile(np.array([-0.6, 0.0, 0.6], np.float32), 3)
    kinds, covers, paints = [], [], []
    for shape in SHAPES:
        for texture in TEXTURES:
            for size, radius in SIZES.items():
                cover, light = coverage(
                    shape, texture, radius * unit, steps[0] + side / 2, steps[1] + side / 2, side, side
                )
                for sigma in SHARPNESS:
                    kinds += [(shape, texture, size)] * len(cover)
                    covers.append(_blur(cover, sigma))
                    paints.append(_blur(light + DARK_TONE * (cover - light), sigma))
    flat = (len(kinds), side * side)
    return _Bank(side, tuple(kinds), np.concatenate(covers).reshape(flat), np.concatenate(paints).reshape(flat))


def _identify(difference: Floats, background: Floats, unit: int) -> tuple[tuple[str, str, str], Floats, float]:
    """Shape, texture and size, RGB of the light tone, and fit of a patch ``[side, side, 3]`` less its background.

    A thing with share ``c`` of a pixel and paint ``m`` times colour ``a`` makes ``difference = m a - c background``;
    for every template the best ``a`` and the squares that it leaves are in closed form.
    """
    bank = _bank(unit)
    flat, behind = difference.reshape(-1, 3), background.reshape(-1, 3)
    norms = np.square(bank.paint).sum(1, keepdims=True)
    product = bank.paint @ flat + (bank.paint * bank.covered) @ behind
    colours = np.clip(product / norms, 0, 255)
    squares = (
        np.square(flat).sum()
        + 2 * (bank.covered @ (flat * behind).sum(1))
        + np.square(bank.covered) @ np.square(behind).sum(1)
    )
    left = squares - 2 * (colours * product).sum(1) + (np.square(colours) * norms).sum(1)
    best = int(left.argmin())
    fit = 1 - float(left[best]) / max(float(np.square(flat).sum()), 1e-6)
    return bank.kinds[best], colours[best], max(fit, 0.0)


def _motion(track: Floats, unit: int) -> str:
    """Direction of the line through a track ``[T, 2]`` in pixels."""
    times = np.flatnonzero(~np.isnan(track[:, 0]))
    if len(times) < 2:
        return "still"
    slope = np.polyfit(times, track[times], 1)[0]
    x, y = slope * (len(track) - 1) / unit
    if max(abs(x), abs(y)) < LEAST_TRAVEL:
        return "still"
    direction = (int(np.sign(x)), 0) if abs(x) > abs(y) else (0, int(np.sign(y)))
    return next(name for name, step in MOTIONS.items() if step == direction)


def _place(x: float, y: float) -> str:
    """Place whose middle is nearest, from shares of width and height."""
    middles = {name: ((x0 + x1) / 2, (y0 + y1) / 2) for name, (x0, y0, x1, y1) in PLACES.items()}
    corner = 1 - SIZES["small"] - MARGIN
    middles[CORNER] = (corner, corner)
    return min(middles, key=lambda name: (middles[name][0] - x) ** 2 + (middles[name][1] - y) ** 2)


def read(clip: Tensor) -> Reading:
    """Say what is in a clip.

    Args:
        clip: ``[3, T, H, W]``, uint8 or floats in [-1, 1]; an image has ``T = 1`` and its things are still.

    Returns:
        The reading; no thing when nothing stands out from the background.

    Raises:
        DataError: The clip is not of that shape, or has values that are not finite.
    """
    pixels = _frames(clip)
    height, width = pixels.shape[1:3]
    unit = min(height, width)
    rows = _fit_backdrop(pixels)
    difference = pixels - rows[:, None]
    foreground = _foreground(difference)
    seen = []
    for region in _regions(foreground):
        around = max_pool2d(torch.from_numpy(region)[None].float(), 3, 1, 1)[0].numpy()
        track = _centroids(foreground & region)
        if np.isnan(track).all():
            continue
        layers = np.concatenate([difference * around[..., None], np.broadcast_to(rows[:, None], pixels.shape)], axis=-1)
        patch = _aligned(layers, track, _bank(unit).side)
        seen.append((track, *_identify(patch[..., :3], patch[..., 3:], unit)))
    if seen:
        # The brightest channel of any colour is at least 190 in bright light and at most 123 in dim light.
        lighting = "bright" if max(float(colour.max()) for _, _, colour, _ in seen) > 155 else "dim"
        background, _ = _name_backdrop(rows, (lighting,))
    else:
        background, lighting = _name_backdrop(rows, tuple(LIGHTING))
    things, tracks, fits = [], [], []
    for track, (shape, texture, size), colour, fit in seen:
        share = (track / (width, height)).astype(np.float32)
        x, y = np.nanmean(share, axis=0)
        name = min(COLOURS, key=lambda c: float(np.square(np.array(COLOURS[c]) * LIGHTING[lighting] - colour).sum()))
        things.append(Thing(shape, name, texture, size, _motion(track, unit), _place(x, y)))
        tracks.append(share)
        fits.append(fit)
    return Reading(Scene(tuple(things), background, lighting), tuple(tracks), tuple(fits))

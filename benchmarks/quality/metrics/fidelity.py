"""How close an output is to its source, pixel by pixel: MAE, MSE, PSNR, SSIM and MS-SSIM, whole or outside a mask.

Each figure is a mean over frames, as FiVE-Bench takes it (`evaluation/evaluate.py`). What a mask hides is set to black
in both clips and counts as equal: the mean is over whole frames, so that large masks make small errors. Pixels are
divided by 255.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

from benchmarks.quality.metrics.clips import check_pair
from bernini.errors import DataError

REACH, SIGMA = 5, 1.5
"""Pixels from the middle of SSIM's Gaussian window to its edge, and its standard deviation."""

SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of MS-SSIM's scales, each half the size of the one before."""

LEAST_MS_SSIM = 161
"""Pixels of the shorter side below which five scales of the window do not fit."""

Border = Literal["cropped", "reflected"]
"""Whether SSIM is averaged where its window fits (Wang et al., 2004; scikit-image; torchmetrics before 1.4.2), or over
all pixels of frames that are continued by their mirror image (torchmetrics since)."""


def mae(output: Tensor, source: Tensor) -> float:
    """Mean absolute error of two clips ``[3, T, H, W]`` uint8, in [0, 1]; 0 if equal.

    Raises:
        DataError: They are not of one size and length.
    """
    check_pair(output, source)
    return (output.int() - source.int()).abs().double().mean().item() / 255


def mse(output: Tensor, source: Tensor, mask: Tensor | None = None) -> float | None:
    """Mean squared error, in [0, 1]; 0 if equal.

    Args:
        output: ``[3, T, H, W]`` uint8.
        source: As large and long.
        mask: ``[T, H, W]`` bool, true where the clips may differ; none where they are compared whole.

    Returns:
        The figure; none if the mask hides all frames.

    Raises:
        DataError: The clips, or the mask, are not of one size and length.
    """
    return _over_frames(lambda a, b: (a - b).square().mean(), output, source, mask)


def psnr(output: Tensor, source: Tensor, mask: Tensor | None = None) -> float | None:
    """Peak signal to noise ratio in dB; infinite if a frame is equal. Arguments and errors as of `mse`."""
    return _over_frames(lambda a, b: -10 * (a - b).square().mean().log10(), output, source, mask)


def ssim(output: Tensor, source: Tensor, mask: Tensor | None = None, *, border: Border = "cropped") -> float | None:
    """Structural similarity (Gaussian window of 11 pixels, sigma 1.5), at most 1.

    Args:
        output: As of `mse`.
        source: As of `mse`.
        mask: As of `mse`.
        border: What is averaged; FiVE-Bench names no version of torchmetrics, and is younger than 1.4.2.

    Returns:
        The figure; none if the mask hides all frames.

    Raises:
        DataError: The clips, or the mask, are not of one size and length, or a side is below 11 pixels.
    """
    check_pair(output, source)
    if min(output.shape[2:]) <= 2 * REACH:
        raise DataError(f"a clip is {tuple(output.shape)}", why=f"a window takes {2 * REACH + 1} pixels a side")
    return _over_frames(lambda a, b: _similarity(a, b, border)[0], output, source, mask)


def ms_ssim(output: Tensor, source: Tensor) -> float:
    """Structural similarity over five scales, in [0, 1], of two clips ``[3, T, H, W]`` uint8.

    Where the mean of a scale is negative, it is taken as 0. Source: Wang, Simoncelli and Bovik (2003).

    Raises:
        DataError: They are not of one size and length, or a side is below 161 pixels.
    """
    check_pair(output, source)
    if min(output.shape[2:]) < LEAST_MS_SSIM:
        raise DataError(f"a clip is {tuple(output.shape)}", why=f"five scales take {LEAST_MS_SSIM} pixels a side")
    figure = _over_frames(_ms_ssim, output, source, None)
    assert figure is not None
    return figure


def _similarity(a: Tensor, b: Tensor, border: Border = "cropped") -> tuple[Tensor, Tensor]:
    """SSIM of two frames ``[3, 1, H, W]``, and the mean of its contrast term. Source: Wang et al. (2004)."""
    line = torch.exp(-0.5 * (torch.arange(-REACH, REACH + 1, dtype=a.dtype) / SIGMA) ** 2)
    line = line / line.sum()
    both = torch.cat((a, b, a * a, b * b, a * b))
    if border == "reflected":
        both = pad(both, (REACH,) * 4, mode="reflect")
    blurred = conv2d(conv2d(both, line[None, None, None]), line[None, None, :, None])
    mean_a, mean_b, square_a, square_b, product = blurred.chunk(5)
    means = mean_a * mean_b
    contrast = (2 * (product - means) + 0.03**2) / (square_a - mean_a**2 + square_b - mean_b**2 + 0.03**2)
    return ((2 * means + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2) * contrast).mean(), contrast.mean()


def _ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    product = torch.ones((), dtype=a.dtype)
    for weight in SCALES[:-1]:
        product = product * _similarity(a, b)[1].clamp(min=0) ** weight
        a, b = avg_pool2d(a, 2), avg_pool2d(b, 2)
    return product * _similarity(a, b)[0].clamp(min=0) ** SCALES[-1]


def _over_frames(
    figure: Callable[[Tensor, Tensor], Tensor], output: Tensor, source: Tensor, mask: Tensor | None
) -> float | None:
    """Mean over frames of a figure of pairs ``[3, 1, H, W]``, float64 in [0, 1], less the frames that a mask hides."""
    check_pair(output, source)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != output.shape[1:]):
        raise DataError(f"a mask is {mask.dtype} {tuple(mask.shape)}", why=f"bool {tuple(output.shape[1:])} is needed")
    found = []
    for t in range(output.shape[1]):
        shown = None if mask is None else ~mask[t]
        if shown is not None and not shown.any():
            continue
        a, b = (clip[:, t, None].double() / 255 for clip in (output, source))
        found.append(figure(a, b) if shown is None else figure(a * shown, b * shown))
    return torch.stack(found).mean().item() if found else None

"""Metrics that need no weights, on real clips, against scikit-image, torchmetrics and OpenCV."""

import math
import sys
from functools import cache
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real_clips import packaged_clips
from scipy.ndimage import gaussian_filter
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from benchmarks.quality.interface import Expectation
from benchmarks.quality.metrics.conformance import deviations
from benchmarks.quality.metrics.fidelity import mae, ms_ssim, mse, psnr, ssim
from benchmarks.quality.metrics.motion import (
    duplicates,
    is_dynamic,
    is_static,
    motion_amplitude,
    smoothness,
    stands_still,
    steps,
    temporal_flickering,
)
from bernini.errors import ConfigError, DataError
from bernini.media import read_video

WINDOW: dict[str, Any] = dict(
    data_range=1.0, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
)


@cache
def clip(name: str, frames: int = 8) -> Tensor:
    media = read_video(packaged_clips() / f"{name}.mp4", max_frames=frames)
    assert media.pixels is not None
    return media.pixels[:, : int(media.source["sampled"])]


def carphone() -> tuple[Tensor, Tensor]:
    return clip("carphone_distorted"), clip("carphone_pristine")


def unit(frames: Tensor) -> np.ndarray:
    """``[T, H, W, 3]`` in [0, 1]."""
    return frames.permute(1, 2, 3, 0).numpy().astype(np.float64) / 255


def boxes(frames: Tensor) -> Tensor:
    """A box of a mask that walks over the clip, and covers the last frame but one."""
    mask = torch.zeros(frames.shape[1:], dtype=torch.bool)
    for t in range(frames.shape[1]):
        mask[t, 20 : 60 + 5 * t, 30 + 8 * t : 90 + 8 * t] = True
    mask[-2] = True
    return mask


# -- fidelity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_fidelity_is_that_of_scikit_image(masked: bool) -> None:
    output, source = carphone()
    mask = boxes(output) if masked else None
    a, b = unit(output), unit(source)
    pairs = list(zip(a, b, strict=True))
    if mask is not None:
        shown = (~mask).numpy()[..., None]
        pairs = [(x * s, y * s) for x, y, s in zip(a, b, shown, strict=True) if s.any()]
        assert len(pairs) == len(a) - 1

    def over(figure: object, **options: object) -> float:
        return float(np.mean([figure(y, x, **options) for x, y in pairs]))  # type: ignore[operator]

    assert mse(output, source, mask) == pytest.approx(over(mean_squared_error), abs=1e-9)
    assert psnr(output, source, mask) == pytest.approx(over(peak_signal_noise_ratio, data_range=1.0), abs=1e-5)
    assert ssim(output, source, mask) == pytest.approx(over(structural_similarity, **WINDOW), abs=1e-5)
    assert mae(output, source) == pytest.approx(np.abs(a - b).mean(), abs=1e-9)


def test_ssim_with_borders_is_that_of_torchmetrics() -> None:
    output, source = carphone()
    a, b = (torch.from_numpy(unit(frames)).permute(0, 3, 1, 2) for frames in (output, source))
    expected = structural_similarity_index_measure(a, b, data_range=1.0)
    assert ssim(output, source, border="reflected") == pytest.approx(float(expected), abs=1e-9)
    assert abs(expected - ssim(output, source)) > 1e-3  # type: ignore[operator]


def test_ms_ssim_is_wangs_over_scikit_images_maps() -> None:
    source = clip("bikes", 1)
    noise = torch.randint(-25, 26, source.shape, generator=torch.Generator().manual_seed(0))
    output = (source.int() + noise).clamp(0, 255).to(torch.uint8)

    def one(a: np.ndarray, b: np.ndarray) -> float:
        product = 1.0
        for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            _, whole = structural_similarity(a, b, full=True, **WINDOW)
            brightness = [gaussian_filter(x, (1.5, 1.5, 0), truncate=3.5) for x in (a, b)]
            luminance = (2 * brightness[0] * brightness[1] + 1e-4) / (brightness[0] ** 2 + brightness[1] ** 2 + 1e-4)
            product *= float((whole if scale == 4 else whole / luminance)[5:-5, 5:-5].mean()) ** weight
            a, b = (x[: x.shape[0] // 2 * 2, : x.shape[1] // 2 * 2] for x in (a, b))
            a, b = (x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, 3).mean((1, 3)) for x in (a, b))
        return product

    expected = np.mean([one(a, b) for a, b in zip(unit(output), unit(source), strict=True)])
    assert ms_ssim(output, source) == pytest.approx(expected, abs=1e-9)
    assert 0.5 < expected < 0.99


def test_equal_clips_are_perfect() -> None:
    bikes = clip("bikes", 1)
    assert (mae(bikes, bikes), mse(bikes, bikes), psnr(bikes, bikes)) == (0, 0, math.inf)
    assert ssim(bikes, bikes) == pytest.approx(1, abs=1e-12) and ms_ssim(bikes, bikes) == pytest.approx(1, abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(11, 20), st.integers(11, 20))
@settings(max_examples=25, deadline=None)
def test_fidelity_knows_no_order_of_clips_and_nothing_below_a_mask(seed: int, t: int, h: int, w: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randint(0, 256, (3, t, h, w), generator=draw).to(torch.uint8) for _ in range(3))
    mask = torch.rand((t, h, w), generator=draw) < 0.4
    for figure in (mse, psnr, ssim):
        found = figure(a, b, mask)
        assert found == pytest.approx(figure(b, a, mask), rel=1e-9)
        assert found == figure(torch.where(mask, c, a), torch.where(mask, a, b), mask)
        assert figure(torch.where(mask, c, a), a, mask) == pytest.approx(figure(a, a), abs=1e-12)
        assert figure(a, b, torch.ones_like(mask)) is None
    low = mse(a, b)
    assert low is not None and 0 <= low <= mae(a, b) <= 1


def test_masks_make_errors_small_because_hidden_pixels_count() -> None:
    output, source = carphone()
    mask = torch.zeros(output.shape[1:], dtype=torch.bool)
    mask[:, :, :88] = True
    right_half = mse(output[..., 88:].contiguous(), source[..., 88:].contiguous())
    assert mse(output, source, mask) == pytest.approx(right_half / 2)  # type: ignore[operator]


def test_clips_that_cannot_be_compared_are_refused() -> None:
    output, source = carphone()
    for wrong, told in ((output[:, :4], "pixel by pixel"), (output.float(), "uint8"), (output[:2], "is torch.uint8")):
        with pytest.raises(DataError, match=told):
            mse(wrong, source)
    with pytest.raises(DataError, match="a mask is"):
        ssim(output, source, torch.zeros(144, 176, dtype=torch.bool))
    with pytest.raises(DataError, match="161"):
        ms_ssim(output, source)


# -- motion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["carphone_distorted", "carphone_pristine", "bikes"])
def test_flicker_is_opencvs_absolute_difference(name: str) -> None:
    frames = [cv2.cvtColor(f, cv2.COLOR_RGB2BGR).astype(np.float32) for f in clip(name).permute(1, 2, 3, 0).numpy()]
    errors = [np.mean(cv2.absdiff(a, b)) for a, b in pairwise(frames)]
    assert temporal_flickering(clip(name)) == pytest.approx((255 - np.mean(errors)) / 255, abs=1e-6)


@pytest.mark.parametrize("name", ["carphone_pristine", "bikes"])
def test_amplitude_is_that_of_opencv(name: str) -> None:
    pixels = clip(name).flip(0).permute(1, 2, 3, 0).contiguous().numpy()
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in pixels]  # of B, G, R as if they were R, G, B
    flows = []
    for a, b in pairwise(greys):
        engine = cv2.FarnebackOpticalFlow.create(3, 0.5, False, 15, 3, 5, 1.2, 0)
        flow = engine.calc(a, b, None)
        rows = int(flow.shape[0] * (16 / flow.shape[1]))
        flows.append(cv2.resize(flow, (16, rows), interpolation=cv2.INTER_AREA))
    assert motion_amplitude(clip(name)) == pytest.approx(abs(np.mean(flows)), abs=1e-5)


@pytest.mark.parametrize(("dx", "dy"), [(2, 0), (0, -3), (2, 2), (2, -2)])
def test_amplitude_is_the_mean_of_signed_directions(dx: int, dy: int) -> None:
    noise = torch.rand((1, 384, 384), generator=torch.Generator().manual_seed(0))
    blobs = torch.nn.functional.avg_pool2d(torch.nn.functional.avg_pool2d(noise, 9, 1, 4), 9, 1, 4)
    still = ((blobs - blobs.mean()) * 600 + 128).clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    moving = torch.stack([still.roll((t * dy, t * dx), (1, 2)) for t in range(4)], 1)[:, :, 32:-32, 32:-32]
    assert motion_amplitude(moving) == pytest.approx(abs(dx + dy) / 2, rel=0.15, abs=0.05)  # less near borders


def test_a_still_clip_neither_flickers_nor_moves() -> None:
    still = clip("carphone_pristine")[:, :1].expand(-1, 5, -1, -1)
    assert temporal_flickering(still) == 1 and motion_amplitude(still) < 1e-3
    assert duplicates(still) == [1, 2, 3, 4] and is_static(still)


def test_repeated_frames_are_named() -> None:
    frames = clip("carphone_pristine")
    stuttering = frames[:, [0, 1, 1, 2, 3, 3, 3, 4]]
    assert duplicates(stuttering) == [2, 5, 6] and duplicates(frames) == []
    assert duplicates(frames, 255) == list(range(1, frames.shape[1]))
    assert not is_static(stuttering) and is_static(stuttering, 255)
    assert not is_static(frames[:, [0, 0, 4, 4]], 0.5)


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
@settings(max_examples=25, deadline=None)
def test_flicker_is_a_share_that_time_reversed_leaves(seed: int, frames: int) -> None:
    pixels = torch.randint(0, 256, (3, frames, 4, 5), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    found = temporal_flickering(pixels)
    assert 0 <= found <= 1 and found == pytest.approx(temporal_flickering(pixels.flip(1)), abs=1e-12)
    assert steps(pixels).shape == (frames - 1,)


def test_one_frame_has_no_motion() -> None:
    single = clip("carphone_pristine")[:, :1]
    for metric in (temporal_flickering, motion_amplitude, duplicates, is_static):
        with pytest.raises(DataError, match="at least 2"):
            metric(single)
    with pytest.raises(DataError, match="no row"):
        motion_amplitude(torch.zeros(3, 2, 4, 128, dtype=torch.uint8))


def test_amplitude_without_opencv_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match=r"bernini\[bench\]"):
        motion_amplitude(clip("carphone_pristine"))


@pytest.mark.parametrize(
    ("lengths", "fps", "dynamic"),
    [
        ([6.1] * 4 + [0.0] * 11, 24, True),  # 16 frames: 4 pairs above 6 pixels at 256
        ([6.1] * 3 + [0.0] * 12, 24, False),
        ([6.0] * 15, 24, False),
        ([11.9] * 15, 4, False),  # 4 fps: 12 pixels
        ([12.1] * 15, 4, True),
        ([0.0], 24, True),  # a quarter of two frames is none
    ],
)
def test_what_vbench_calls_dynamic(lengths: list[float], fps: float, dynamic: bool) -> None:
    assert is_dynamic(lengths, 256, 400, fps) is is_dynamic(lengths, 400, 256, fps) is dynamic


@pytest.mark.parametrize(
    ("lengths", "ends", "still"),
    [
        ([2.9] * 15, (2.9, 2.9), True),  # 16 frames, shorter side 256: 3 pixels, at most twice
        ([2.9] * 13 + [9.0] * 2, (11.9, 11.9), True),
        ([2.9] * 12 + [3.1] * 3, (0.0, 0.0), False),
        ([0.0] * 15, (0.0, 12.1), False),  # creeping: 3 * 2 * 2 pixels from end to end
        ([0.0] * 15, (12.1, 0.0), False),
        ([9.0] * 10 + [0.0] * 70, (0.0, 0.0), True),  # 81 frames: at most ten
        ([9.0] * 11 + [0.0] * 69, (0.0, 0.0), False),
        ([0.0] * 3, (0.1, 0.0), False),  # four frames: round(0.5) is 0, and nothing may move
    ],
)
def test_what_stands_still_is_what_vbench_keeps(lengths: list[float], ends: tuple[float, float], still: bool) -> None:
    assert stands_still(lengths, ends, 256, 400) is stands_still(lengths, ends, 400, 256) is still
    double = [2 * length for length in lengths], (2 * ends[0], 2 * ends[1])
    assert stands_still(*double, 512, 512) is still
    with pytest.raises(DataError):
        stands_still([], ends, 256, 256)


def test_smoothness_loses_both_sides_of_a_jump() -> None:
    assert smoothness([0.5] * 8) == 1 and smoothness([0.5]) == 1
    assert smoothness([0.5, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]) == 0.75
    assert smoothness([0.5, 0.6, 0.5, 0.5]) == 0.25  # frame 1 is a side of two jumps and lost once
    assert smoothness([0.5, 0.52, 0.54, 0.56]) == 1
    with pytest.raises(DataError):
        smoothness([])


# -- conformance --------------------------------------------------------------------------------------------------


def test_what_deviates_is_named_with_both_figures() -> None:
    frames = clip("carphone_pristine")
    expect = Expectation(frames.shape[1], 144, 176, 29.97)
    assert deviations(frames, 29.9701, expect) == {}
    assert deviations(frames[:, :4, :100], 25, expect) == {
        "frames": (4, frames.shape[1]),
        "height": (100, 144),
        "fps": (25, 29.97),
    }

"""The planner's view of pixels, against transformers' image processor and the released figures."""

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from bernini.errors import ConfigError, DataError
from bernini.planner.vision import TargetSize, VisionConfig, frame_indices, prepare, resize, smart_size, target_grid

CONFIG = VisionConfig()
TALL = [(661, 273), (150, 30), (31, 586), (182, 18)]  # resized down the columns first
SIZES = [(512, 512), (224, 224), (64, 64), (56, 84), (480, 848), (37, 300), (9, 9), (339, 672), *TALL]
OLD_PILLOW = int(PIL.__version__.split(".")[0]) < 13


def noise(height, width, frames=1, seed=0, levels=256):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, levels, (3, frames, height, width), generator=generator)
    return (drawn * 255 // (levels - 1)).to(torch.uint8)


def picture(frame):
    return Image.fromarray(frame.permute(1, 2, 0).numpy())


def processed(frame, config=CONFIG):
    """Patches and grid of one frame ``[3, H, W]`` from transformers."""
    processor = Qwen2VLImageProcessorPil(min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    out = processor(images=[picture(frame)], return_tensors="pt")
    return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())


@pytest.mark.parametrize("size", SIZES)
def test_images_equal_transformers(size):
    if OLD_PILLOW and size in TALL:
        pytest.skip("Pillow before 13 resizes tall frames in another order")
    pixels = noise(*size, seed=sum(size))
    patches, grid = processed(pixels[:, 0])
    visual = prepare(pixels, False, 0.0, CONFIG)
    assert visual.grid == grid and visual.patches.dtype == torch.float32
    torch.testing.assert_close(visual.patches, patches, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"), [((40, 60), (28, 28)), ((30, 20), (84, 56)), ((64, 64), (56, 112)), ((90, 50), (28, 50))]
)
@pytest.mark.parametrize("levels", [2, 256])  # black and white noise overshoots in both passes
def test_resize_gives_pillows_bytes(old, new, levels):
    if OLD_PILLOW and old == (90, 50):
        pytest.skip("Pillow before 13 resizes tall frames in another order")
    pixels = noise(*old, frames=2, levels=levels)
    resized = resize(pixels, *new)
    for t in range(2):
        expected = np.array(picture(pixels[:, t]).resize(new[::-1], Image.Resampling.BICUBIC))
        assert np.array_equal(resized[:, t].permute(1, 2, 0), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", SIZES)
def test_cuda_gives_the_same_bytes(size):
    pixels = noise(*size, frames=2, levels=2)
    found = resize(pixels.cuda(), 168, 280)
    assert found.is_cuda and torch.equal(found.cpu(), resize(pixels, 168, 280))


def test_clips_are_pairs_of_frames():
    config = VisionConfig(min_pixels=28 * 28, max_pixels=56 * 84, fps=4.0)
    pixels = noise(60, 90, frames=9)
    visual = prepare(pixels, True, 8.0, config)
    assert visual.grid == (2, 4, 6) and visual.tokens == 12
    cut = visual.patches.view(2, 24, 3, 2, 14 * 14)
    for place, frame in enumerate([0, 3, 5, 8]):
        patches, grid = processed(pixels[:, frame], config)
        assert grid == (1, 4, 6)
        expected = patches.view(24, 3, 2, 14 * 14)[:, :, 0]
        torch.testing.assert_close(cut[place // 2, :, :, place % 2], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "size", "is_video", "grid", "tokens"),
    [
        (81, (480, 848), True, (5, 12, 20), 300),
        (49, (480, 848), True, (3, 12, 20), 180),
        (1, (512, 512), False, (1, 16, 16), 64),
        (9, (64, 64), True, (1, 4, 4), 4),
    ],
)
def test_token_counts_are_the_released_ones(frames, size, is_video, grid, tokens):
    assert target_grid(TargetSize(frames, *size, fps=16.0), is_video, CONFIG) == grid
    pixels = torch.zeros(3, 1, 1, 1, dtype=torch.uint8).expand(3, frames, *size)
    visual = prepare(pixels, is_video, 16.0, CONFIG)
    assert (visual.grid, visual.tokens, visual.is_video) == (grid, tokens, is_video)
    assert visual.patches.shape == (4 * tokens, 3 * 2 * 14 * 14)


@pytest.mark.parametrize(
    ("frames", "fps", "config", "indices"),
    [
        (81, 16, CONFIG, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (9, 16, CONFIG, [0, 8]),
        (1, 16, CONFIG, [0, 0]),
        (9, 16, VisionConfig(fps=16), [0, 1, 2, 3, 4, 5, 6, 7]),
        (1, 16, VisionConfig(fps=16), [0, 0]),
        (33, 16, VisionConfig(fps=4, max_frames=5), [0, 5, 9, 14]),
    ],
)
def test_frames_are_sampled_as_released(frames, fps, config, indices):
    assert frame_indices(frames, fps, config).tolist() == indices


@given(frames=st.integers(1, 400), fps=st.floats(1, 60), rate=st.floats(0.5, 30), limit=st.integers(2, 20))
def test_sampled_frames_exist_and_fill_patches(frames, fps, rate, limit):
    found = frame_indices(frames, fps, VisionConfig(fps=rate, max_frames=limit))
    assert len(found) % 2 == 0 and 2 <= len(found) <= limit
    assert found[0] == 0 and found[-1] < frames and (found.diff() >= 0).all()


@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_sizes_are_qwens(height, width):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(DataError, match="too long"):
            smart_size(height, width, CONFIG)
    else:
        expected = smart_resize(height, width, 28, CONFIG.min_pixels, CONFIG.max_pixels)
        assert smart_size(height, width, CONFIG) == expected


@pytest.mark.parametrize(
    ("pixels", "is_video", "fps", "message"),
    [
        (torch.zeros(3, 2, 32, 32), True, 8.0, r"cannot see \(3, 2, 32, 32\) torch.float32"),
        (torch.zeros(1, 2, 32, 32, dtype=torch.uint8), True, 8.0, "cannot see"),
        (noise(32, 32, frames=2), False, 0.0, "an image of 2 frames"),
        (noise(32, 32, frames=2), True, 0.0, "no frame rate"),
        (noise(2, 500), False, 0.0, "too long"),
    ],
)
def test_bad_pixels_are_refused(pixels, is_video, fps, message):
    with pytest.raises(DataError, match=message):
        prepare(pixels, is_video, fps, CONFIG)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"max_pixels": 27 * 28, "min_pixels": 1}, "leaves no size"),
        ({"max_pixels": 3000}, "leaves no size"),
        ({"max_frames": 1}, "less than one patch"),
        ({"fps": 0.0}, "must be positive"),
    ],
)
def test_impossible_numbers_are_refused(numbers, message):
    with pytest.raises(ConfigError, match=message):
        VisionConfig(**numbers)


@pytest.mark.parametrize("numbers", [{"frames": 0}, {"height": 0}, {"width": -1}, {"fps": 0.0}])
def test_impossible_targets_are_refused(numbers):
    with pytest.raises(ConfigError, match="cannot plan"):
        TargetSize(**numbers)

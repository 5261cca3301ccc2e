"""VBench and VBench-I2V: consistency by DINO and CLIP, aesthetics, quality, style. Source: the package vbench 0.1.5.

Frames are resized as floats, without smoothing what shrinks, unless it says otherwise.
"""

from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.quality.interface import Item
from benchmarks.quality.metrics.encoders import Clip, Dino, Rated
from benchmarks.quality.metrics.likeness import conformity, consistency, cosines
from benchmarks.quality.metrics.packaged import Musiq
from benchmarks.quality.metrics.preparing import CLIP, Preparation
from benchmarks.quality.models.base import PILLOW_CLIP, Measure, clip, dino, musiq, rated
from benchmarks.quality.official.base import OfficialBenchmark
from bernini.media import read_image

QUALITY_EDGE = 512  # longest edge of a frame that MUSIQ is shown
FOR_CLIP = Preparation(224, "bicubic", "torch", crop=224, colours=CLIP)
FOR_DINO = Preparation(224, "bilinear", "torch")
GIVEN, FOLLOWING = (Preparation(256, "bicubic", by, crop=224) for by in ("pillow", "torch_antialias"))
"""VBench-I2V's given image, and frames; torchvision smooths since 0.17, where it is not told otherwise."""


def subject(model: Dino, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """DINO's consistency (`vbench/subject_consistency.py`)."""
    return consistency(model.features(FOR_DINO(pixels)))


def background(model: Clip, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """CLIP's consistency (`vbench/background_consistency.py`)."""
    return consistency(model.images(FOR_CLIP(pixels)))


def aesthetics(model: Rated, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """A tenth of the mean rating (`vbench/aesthetic_quality.py`)."""
    return model.ratings(FOR_CLIP(pixels)).mean().item() / 10


def quality(model: Musiq, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """A hundredth of the mean rating of frames of at most 512 pixels (`vbench/imaging_quality.py`)."""
    frames, longest = pixels.permute(1, 0, 2, 3).float(), max(pixels.shape[2:])
    if longest > QUALITY_EDGE:
        size = [int(QUALITY_EDGE / longest * edge) for edge in pixels.shape[2:]]
        frames = interpolate(frames, size, mode="bilinear", align_corners=False)
    return model.ratings(frames / 255).mean().item() / 100


def style(model: Clip, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """A hundredth of the mean logit of frames and the style's name (`vbench/appearance_style.py`)."""
    text = model.text(item.extra["auxiliary_info"]["appearance_style"]["appearance_style"])
    return model.scale * cosines(model.images(PILLOW_CLIP(pixels)), text).mean().item() / 100


def given_subject(model: Dino, benchmark: OfficialBenchmark, item: Item, pixels: Tensor) -> float:
    """DINO's likeness to the given image (`vbench2_beta_i2v/i2v_subject.py`)."""
    (image,) = benchmark.sources(item)[1]
    given = read_image(image).pixels
    assert given is not None
    return conformity(model.features(GIVEN(given)), model.features(FOLLOWING(pixels)))


VBENCH = {
    "subject_consistency": Measure(dino, subject),
    "background_consistency": Measure(clip, background),
    "aesthetic_quality": Measure(rated, aesthetics),
    "imaging_quality": Measure(musiq, quality),
    "appearance_style": Measure(clip, style),
}
VBENCH_I2V = {
    "i2v_subject": Measure(dino, given_subject),
    **{name: measure for name, measure in VBENCH.items() if name != "appearance_style"},
}

"""Pixels as Qwen2.5-VL's vision tower takes them: frames are sampled, resized, normalised and cut into patches.

The numbers and their order are those of transformers' `Qwen2VLImageProcessorPil` and of the released frame sampling, in
plain torch on ``uint8`` tensors.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from bernini.conversation import Conversation, Message
from bernini.errors import ConfigError, DataError

Grid = tuple[int, int, int]
"""Patches of a visual along time, height and width, before the tower merges them."""

MAX_ASPECT = 200  # Qwen refuses images with one edge longer than this times the other
_FIXED = 1 << 22  # Pillow resizes in integers, with weights of 22 fractional bits


@dataclass(frozen=True)
class VisionConfig:
    """How pixels become patches; the defaults are the released planner's.

    Attributes:
        patch: Edge of a patch in pixels.
        temporal_patch: Frames of a patch.
        merge: Patches along each edge that the tower merges into one token.
        min_pixels: Least pixels of an image or a frame after the resize.
        max_pixels: Most pixels of an image or a frame after the resize.
        fps: Frames per second that are taken from a clip. The released pipeline takes an eighth of the asked rate,
            which is 2 at its 16 fps.
        max_frames: Most frames of a clip; what lies beyond them is cut off.
        tokens_per_second: Temporal positions per second of a clip, as in the tower's configuration.
        mean: Mean of the RGB channels in [0, 1], CLIP's.
        std: Their standard deviation.
    """

    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 224 * 224
    fps: float = 2.0
    max_frames: int = 12
    tokens_per_second: float = 2.0
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if min(self.patch, self.temporal_patch, self.merge, self.min_pixels, self.fps) <= 0:
            raise ConfigError("vision sizes and rates must be positive")
        if self.max_frames < self.temporal_patch:
            raise ConfigError(f"vision.max_frames {self.max_frames} is less than one patch of {self.temporal_patch}")
        if self.max_pixels < max(self.min_pixels, self.factor**2):
            raise ConfigError(
                f"vision.max_pixels {self.max_pixels} leaves no size to choose",
                why=f"edges are multiples of {self.factor}, and min_pixels is {self.min_pixels}",
            )

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "VisionConfig":
        """Read ``dataclasses.asdict`` back, which JSON has made lists of tuples in."""
        numbers: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
        return cls(**numbers)

    @property
    def factor(self) -> int:
        """What the edges of a resized frame are multiples of, in pixels."""
        return self.patch * self.merge

    @property
    def columns(self) -> int:
        """Numbers of one patch."""
        return 3 * self.temporal_patch * self.patch**2

    def check_made(self, visual: "Visual", where: str) -> None:
        """Compare with the numbers that a visual was made with; the rate of positions has no part in that.

        Raises:
            ConfigError: They differ.
        """
        if visual.config == self:
            return
        names = [f.name for f in fields(self) if f.name != "tokens_per_second"]
        own, its = ({name: getattr(config, name) for name in names} for config in (self, visual.config))
        if differing := [f"{name} {its[name]}, not {own[name]}" for name in names if own[name] != its[name]]:
            raise ConfigError(
                "an image or a clip was prepared for another planner",
                where=where,
                why=f"it was made with {'; '.join(differing)}",
                fix="give the data module the planner's own `vision`, or prepare the data anew with this planner",
            )


@dataclass(frozen=True)
class TargetSize:
    """The size that was asked of a target that has no pixels and no source video to follow.

    Attributes:
        frames: Frames of a clip; an image has one whatever this says.
        height: Height in pixels.
        width: Width in pixels.
        fps: Frames per second of a clip.
    """

    frames: int = 81
    height: int = 480
    width: int = 848
    fps: float = 16.0

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1 or self.fps <= 0:
            raise ConfigError(
                f"cannot plan {self.frames} frames of {self.width}x{self.height} pixels at {self.fps} fps",
                fix="ask for positive numbers",
            )


@dataclass
class Visual:
    """An image or a clip, ready for the vision tower or through it already.

    Attributes:
        patches: ``[t * h * w, columns]`` float32, normalised. Rows run over (t, h / merge,
            w / merge, merge, merge), columns over (channel, frame, y, x). A visual with features has no rows.
        grid: ``(t, h, w)`` in patches.
        is_video: Whether it is a clip.
        config: What it was made with.
        features: ``[tokens, D]`` embeddings that the tower made of it, if they were prepared.
        tower: Fingerprint of that tower.
    """

    patches: Tensor
    grid: Grid
    is_video: bool
    config: VisionConfig
    features: Tensor | None = None
    tower: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that the language model sees."""
        return math.prod(self.grid) // self.config.merge**2

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Visual":
        """A copy with its tensors on ``device``."""
        features = None if self.features is None else self.features.to(device, non_blocking=non_blocking)
        return replace(self, patches=self.patches.to(device, non_blocking=non_blocking), features=features)


def smart_size(height: int, width: int, config: VisionConfig) -> tuple[int, int]:
    """Size near the given one within Qwen's pixel limits, both edges multiples of ``patch * merge``.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        config: Limits.

    Returns:
        Height and width.

    Raises:
        DataError: One edge is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise DataError(
            f"a frame of {width}x{height} pixels is too long for the planner",
            why=f"one edge may be at most {MAX_ASPECT} times the other",
            fix="crop it",
        )
    factor = config.factor
    # Python rounds halves to even, and so does Qwen.
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > config.max_pixels:
        shrink = math.sqrt(height * width / config.max_pixels)
        rows, columns = (max(1, math.floor(edge / shrink / factor)) for edge in (height, width))
    elif rows * columns * factor**2 < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (height * width))
        rows, columns = (math.ceil(edge * grow / factor) for edge in (height, width))
    return rows * factor, columns * factor


def frame_indices(frames: int, fps: float, config: VisionConfig) -> Tensor:
    """Frames of a clip that the tower sees: ``config.fps`` of them a second, spread evenly, in whole temporal patches.

    Args:
        frames: Frames of the clip, at least 1.
        fps: Frames per second of the clip.
        config: Rate and limit.

    Returns:
        Ascending indices ``[n]`` int64, ``n`` a multiple of ``temporal_patch``; a short clip repeats frames.

    Raises:
        DataError: The clip has no frame rate.
    """
    if fps <= 0:
        raise DataError("the clip has no frame rate", fix="set the `fps` of its media")
    step = config.temporal_patch
    count = max(1, math.floor(frames / fps * config.fps / step)) * step
    if fps == config.fps:  # nothing to thin out: whole patches from the start, the odd frame is left out
        frames = max(1, frames // step * step)
    indices = torch.linspace(0, frames - 1, count).round().long()
    return indices[: config.max_frames // step * step]


def target_grid(size: TargetSize, is_video: bool, config: VisionConfig) -> Grid:
    """Grid of a target that is yet to be made: the one that `prepare` gives to pixels of that size.

    Args:
        size: Asked size.
        is_video: Whether the target is a clip.
        config: Numbers of the tower.

    Returns:
        ``(t, h, w)`` in patches.

    Raises:
        DataError: The size has an impossible shape or, for a clip, no frame rate.
    """
    height, width = smart_size(size.height, size.width, config)
    frames = len(frame_indices(size.frames, size.fps, config)) if is_video else 1
    return math.ceil(frames / config.temporal_patch), height // config.patch, width // config.patch


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize as Pillow's bicubic filter does, byte for byte; torch's own resizes differ from it by some levels.

    Pillow sums pixels with fixed-point weights along one axis, rounds to bytes, and goes on along the other. Those sums
    are integers below 2**32, which float64 holds exactly, so that matrix products on any device give the same bytes.

    Args:
        pixels: ``[3, T, H, W]`` uint8.
        height: New height.
        width: New width.

    Returns:
        ``[3, T, height, width]`` uint8, on the device of ``pixels``.
    """
    old_height, old_width = pixels.shape[2:]
    if (old_height, old_width) == (height, width):
        return pixels
    # The order of Pillow 13. Older ones go along the rows first whatever the size, which shows in tall frames only.
    saved = old_height - height
    vertical_first = saved > 0 and saved > 2 * (old_width - width)
    device = torch.device("cpu") if pixels.device.type == "mps" else pixels.device  # Metal has no float64
    down, across = (_weights(*edges).to(device) for edges in ((old_height, height), (old_width, width)))
    planes = []
    for plane in pixels.flatten(0, 1).to(device):  # one at a time: float64 takes eight times the memory
        if vertical_first:
            planes.append(_to_bytes(_to_bytes(down @ plane.double()).double() @ across.T))
        else:
            planes.append(_to_bytes(down @ _to_bytes(plane.double() @ across.T).double()))
    return torch.stack(planes).view(3, -1, height, width).to(pixels.device)


def _weights(old: int, new: int) -> Tensor:
    """Pillow's weights ``[new, old]`` of old pixels in new ones: integers, in units of 1 / _FIXED, as float64."""
    scale = old / new
    stretch = max(scale, 1.0)
    centers = (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * scale
    # Keys' cubic with a = -1/2, as wide as two new pixels or two old ones, whichever is more.
    x = ((torch.arange(old) - centers + 0.5) / stretch).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = weights / weights.sum(dim=1, keepdim=True) * _FIXED
    return torch.trunc(weights + 0.5 * weights.sign())


def _to_bytes(sums: Tensor) -> Tensor:
    return ((sums + _FIXED // 2) / _FIXED).floor().clamp(0, 255).to(torch.uint8)


def prepare(pixels: Tensor, is_video: bool, fps: float, config: VisionConfig) -> Visual:
    """Turn an image or a clip into patches.

    Args:
        pixels: ``[3, T, H, W]`` uint8; ``T = 1`` for an image.
        is_video: Whether it is a clip, to be sampled at ``config.fps``.
        fps: Frames per second of a clip; not looked at for an image.
        config: Numbers of the tower.

    Returns:
        The patches, on the device of ``pixels``. A frame that lacks a partner is paired with itself.

    Raises:
        DataError: ``pixels`` is no image or clip of uint8, or has an impossible shape or no frame rate.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[0] != 3 or 0 in pixels.shape:
        raise DataError(
            f"the planner cannot see {tuple(pixels.shape)} {pixels.dtype}", why="pixels are [3, T, H, W] uint8"
        )
    if not is_video and pixels.shape[1] != 1:
        raise DataError(f"an image of {pixels.shape[1]} frames", why="an image is [3, 1, H, W] uint8")
    if is_video:
        pixels = pixels[:, frame_indices(pixels.shape[1], fps, config).to(pixels.device)]
    height, width = smart_size(pixels.shape[2], pixels.shape[3], config)
    frames = resize(pixels, height, width).float() / 255
    mean, std = (frames.new_tensor(values).view(3, 1, 1, 1) for values in (config.mean, config.std))
    frames = (frames - mean) / std
    patch, pair, merge = config.patch, config.temporal_patch, config.merge
    if missing := -frames.shape[1] % pair:
        frames = torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1)], dim=1)
    t, h, w = frames.shape[1] // pair, height // patch, width // patch
    cut = frames.reshape(3, t, pair, h // merge, merge, patch, w // merge, merge, patch)
    patches = cut.permute(1, 3, 6, 4, 7, 0, 2, 5, 8).reshape(t * h * w, -1)
    return Visual(patches, (t, h, w), is_video, config)


def look_at(message: Message, config: VisionConfig, key: str = "") -> Visual | None:
    """The image or clip of a message as the tower takes it, made now unless it was prepared.

    Args:
        message: A visual message.
        config: Numbers of the tower.
        key: Sample that it is of, for errors.

    Returns:
        The visual, or null if the message shows nothing.

    Raises:
        ConfigError: It was prepared with other numbers.
        DataError: Its pixels are not what `prepare` takes.
    """
    media = message.media
    if media is None:
        return None
    where = media.path or key
    if media.visual is not None:
        config.check_made(media.visual, where)
        return media.visual
    if media.pixels is None:
        return None
    try:
        return prepare(media.pixels, message.is_video, media.fps, config)
    except DataError as error:
        raise DataError(error.what, where=where, why=error.why, fix=error.fix) from error


def add_visuals(sample: Conversation, config: VisionConfig) -> None:
    """Leave beside the pixels of every image and clip what the tower takes of them; see `look_at`."""
    for message in sample.visual:
        if message.media is not None:
            message.media.visual = look_at(message, config, sample.key)

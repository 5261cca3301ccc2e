"""Clips and images between files and ``uint8`` tensors: decode, encode, resize, and back to the source's geometry.

PyAV and Pillow are imported when they are first needed, so that the models can be used without either.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bernini.conversation import Media
from bernini.decoding import Decode, Limits, Probe, check_size, decode_video, open_source, open_video
from bernini.errors import ConfigError, DataError
from bernini.files import replacing

if TYPE_CHECKING:
    from av.video.stream import VideoStream
    from PIL.Image import Image

CropMethod = Literal["left", "center", "right"]
_IMAGES = ("PNG", "JPEG", "WEBP", "BMP")


@dataclass(frozen=True)
class FrameRule:
    """Which frames of a file make a clip.

    Attributes:
        first: First frame of the covered span, counted in the file.
        covered: Frames of the file in the covered span.
        sampled: Frames of the clip that are not padding.
        indices: File frame of every frame of the clip; ``4k + 1`` of them, the last one repeated as padding.
    """

    first: int
    covered: int
    sampled: int
    indices: tuple[int, ...]


def frame_rule(
    frames: int,
    native_fps: float,
    fps: float | None = None,
    max_frames: int | None = None,
    crop_method: CropMethod = "left",
) -> FrameRule:
    """Sample ``frames`` file frames at ``fps``, to a count of ``4k + 1`` as the Wan VAE takes them.

    The frames are spread evenly over the covered span, its first and last included. A count that is not ``4k + 1`` is
    padded up by repeating the last frame, so that nothing of a clip is lost; only a clip longer than ``max_frames`` is
    cut, down to the largest ``4k + 1`` that ``max_frames`` allows.

    Args:
        frames: Frames of the file, at least 1.
        native_fps: Frames per second of the file.
        fps: Frames per second of the clip; ``None`` keeps the file's.
        max_frames: Most frames of the clip; ``None`` for no limit.
        crop_method: Part of a too long file that is kept: ``left`` is its start, ``right`` its end.

    Returns:
        The rule, to be applied by `read_video`.
    """
    fps = fps or native_fps
    sampled = max(1, round(frames * fps / native_fps))
    limit = sampled + 3 if max_frames is None else max_frames
    limit -= (limit - 1) % 4
    first, covered = 0, frames
    if sampled > limit:
        sampled = limit
        covered = min(frames, max(1, round(limit * native_fps / fps)))
        first = {"left": 0, "center": (frames - covered) // 2, "right": frames - covered}[crop_method]
    steps = torch.linspace(0, covered - 1, sampled, dtype=torch.float64).round().long().tolist()
    padding = -(sampled - 1) % 4
    return FrameRule(first, covered, sampled, tuple(first + s for s in steps + steps[-1:] * padding))


def read_video(
    file: str | Path | bytes,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    start: float = 0.0,
    duration: float | None = None,
    crop_method: CropMethod = "left",
    where: str = "",
    decode: Decode = decode_video,
) -> Media:
    """Read a clip.

    Frames are taken by their number, at the average rate of the file, as `frame_rule` says; in a file whose frames come
    at other times, a number is the frame nearest to its time. Rotation metadata is applied. The decoder runs from the
    start of the file, stops at the first error and keeps only the frames asked for.

    Args:
        file: Path (MP4, MOV, MKV, WebM or AVI, as its suffix says), or the bytes of an MP4.
        fps: Frames per second to sample at; ``None`` keeps the file's.
        max_frames: Most frames of the clip.
        start: Seconds of the file to skip.
        duration: Seconds to use; ``None`` reads on to the end.
        crop_method: Part of a too long clip that is kept.
        where: What to call the file in an error; its path when empty.
        decode: What decodes: this process, or for files that are not trusted `datamodules.decoder.Decoder`.

    Returns:
        ``pixels`` ``[3, T, H, W]`` uint8 with ``T = 4k + 1``, each frame channels-last in memory, ``fps``, and
        ``source``: ``height``, ``width``, ``frames``, ``fps`` of the covered span of the file, and ``sampled``, the
        frames of ``pixels`` without padding.

    Raises:
        ConfigError: An option has no meaning, as a negative rate.
        DataError: The file is missing, damaged, or has no video or no frame.
    """
    if crop_method not in get_args(CropMethod):
        raise ConfigError(f"unknown crop_method {crop_method!r}", where=where, fix="use left, center or right")
    if (fps is not None and fps <= 0) or (max_frames is not None and max_frames < 1) or start < 0:
        raise ConfigError(
            f"cannot sample at fps {fps}, max_frames {max_frames}, start {start}", fix="use positive numbers, or null"
        )
    where = where or ("" if isinstance(file, bytes) else str(file))

    def rule(probed: Probe) -> tuple[int, FrameRule]:
        skipped = round(start * probed.fps)
        left = probed.frames - skipped
        span = left if duration is None else min(left, round(duration * probed.fps))
        if span < 1:
            held = f"the file has {probed.frames} frames at {probed.fps:g} fps"
            why = f"{held}, asked for {duration or 'all'} s from second {start:g}"
            raise DataError("the clip has no frame to read", where=where, why=why, fix="check `start` and `duration`")
        return skipped, frame_rule(span, probed.fps, fps, max_frames, crop_method)

    def pick(probed: Probe) -> list[int]:
        skipped, sampled = rule(probed)
        return [skipped + index for index in sampled.indices]

    probed, frames = decode(file, pick, where)
    _, taken = rule(probed)
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)
    source = {"height": pixels.shape[2], "width": pixels.shape[3], "frames": taken.covered, "fps": probed.fps}
    path = None if isinstance(file, bytes) else str(file)
    return Media(path=path, pixels=pixels, fps=float(fps or probed.fps), source={**source, "sampled": taken.sampled})


def probe_video(file: str | Path | bytes, *, where: str = "") -> dict[str, float]:
    """Count the frames of a clip without decoding them.

    Args:
        file: Path, or the bytes of an MP4.
        where: What to call the file in an error; its path when empty.

    Returns:
        ``height`` and ``width`` as stored, before any rotation, ``frames`` and ``fps``.

    Raises:
        DataError: The file is missing, cut short, of a kind that is not decoded, or has no video.
    """
    where = where or ("" if isinstance(file, bytes) else str(file))
    source, suffix = open_source(file, where)
    with source, open_video(source, suffix, where) as video:
        probed = video.probed
    return {"height": probed.height, "width": probed.width, "frames": probed.frames, "fps": probed.fps}


def write_video(path: str | Path, pixels: Tensor, fps: float, *, lossless: bool = False) -> None:
    """Write an H.264 MP4 of exactly the size, length and rate given.

    Args:
        path: File to write; it appears whole or not at all.
        pixels: ``[3, T, H, W]`` uint8.
        fps: Frames per second; rates such as 30000/1001 are stored exactly.
        lossless: Keep every pixel value, as RGB, which few players show. Otherwise BT.709, constant quality 18, in the
            4:2:0 format that every player shows or, for an odd height or width, in 4:4:4.

    Raises:
        DataError: ``pixels`` is not a clip of uint8.
    """
    _check_pixels(pixels, str(path))
    with replacing(path) as temporary, temporary.open("wb") as file:
        _encode(file, pixels, fps, lossless)


def encode_video(pixels: Tensor, fps: float, *, lossless: bool = False) -> bytes:
    """Bytes of the file that `write_video` writes."""
    _check_pixels(pixels, "")
    file = io.BytesIO()
    _encode(file, pixels, fps, lossless)
    return file.getvalue()


def _encode(file: Any, pixels: Tensor, fps: float, lossless: bool) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    height, width = pixels.shape[2:]
    layout = "rgb24" if lossless else "yuv444p" if height % 2 or width % 2 else "yuv420p"
    with av.open(file, "w", format="mp4") as container:
        stream: VideoStream = container.add_stream(  # type: ignore[assignment]
            "libx264rgb" if lossless else "libx264",
            rate=Fraction(fps).limit_denominator(1001),
            # Macroblock trees make of one clip, at some sizes, files of different bytes.
            options={"qp": "0"} if lossless else {"crf": "18", "x264-params": "mbtree=0"},
        )
        stream.height, stream.width, stream.pix_fmt = height, width, layout
        if height * width > 256 * 256:
            stream.thread_type = "AUTO"
        else:
            # Else the encoder takes a number of threads that depends on the machine.
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        if not lossless:
            context = stream.codec_context
            context.color_range, context.colorspace, context.color_primaries, context.color_trc = 1, 1, 1, 1
        for array in pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy():
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if not lossless:
                frame = frame.reformat(format=layout, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _check_pixels(pixels: Tensor, where: str) -> None:
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[0] != 3 or 0 in pixels.shape:
        raise DataError(
            f"cannot write {tuple(pixels.shape)} {pixels.dtype}", where=where, why="pixels are [3, T, H, W] uint8"
        )


def read_image(file: str | Path | bytes, *, where: str = "", limits: Limits | None = None) -> Media:
    """Read an image, turned upright as its metadata says; transparency becomes white.

    Args:
        file: Path, or the bytes of a PNG, JPEG, WebP or BMP file.
        where: What to call the file in an error; its path when empty.
        limits: What it may cost; null for a file that is trusted.

    Returns:
        ``pixels`` ``[3, 1, H, W]`` uint8 and ``source``.

    Raises:
        DataError: The file is missing, damaged or beyond a limit.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with _open_image(file, where, limits) as image:
        upright = ImageOps.exif_transpose(image).convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    pixels = torch.from_numpy(np.array(flat)).permute(2, 0, 1)[:, None].contiguous()
    source = {"height": pixels.shape[2], "width": pixels.shape[3], "frames": 1, "fps": 0.0, "sampled": 1}
    return Media(path=None if isinstance(file, bytes) else str(file), pixels=pixels, source=source)


def image_size(data: bytes, where: str, limits: Limits | None = None) -> tuple[int, int]:
    """Height and width in pixels of a file's bytes, as stored, without decoding it.

    Raises:
        DataError: As for `read_image`, as far as the header shows.
    """
    with _open_image(data, where, limits) as image:
        return image.height, image.width


@contextmanager
def _open_image(file: str | Path | bytes, where: str, limits: Limits | None) -> Iterator["Image"]:
    """Open an image; what Pillow raises in the context becomes a `DataError`."""
    from PIL import Image, UnidentifiedImageError

    where = where or ("" if isinstance(file, bytes) else str(file))
    if not isinstance(file, bytes) and not Path(file).is_file():
        raise DataError("the image does not exist", where=where, fix="check the path; it is relative to its list")
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_IMAGES) as image:
            check_size(image.height, image.width, where, limits)
            yield image
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        why = "it is of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"the image cannot be read: {why}", where=where, fix="save it again as PNG") from error


def write_image(path: str | Path, pixels: Tensor) -> None:
    """Write ``[3, 1, H, W]`` uint8 pixels to a file whose suffix names the format; it appears whole or not at all.

    Raises:
        DataError: ``pixels`` is not one frame of uint8.
    """
    with replacing(path) as temporary:
        _image(pixels, str(path)).save(temporary)


def encode_image(pixels: Tensor) -> bytes:
    """PNG bytes of ``[3, 1, H, W]`` uint8 pixels."""
    file = io.BytesIO()
    _image(pixels, "").save(file, format="PNG")
    return file.getvalue()


def _image(pixels: Tensor, where: str) -> Any:
    from PIL import Image

    _check_pixels(pixels, where)
    if pixels.shape[1] != 1:
        raise DataError(f"an image of {pixels.shape[1]} frames", where=where, why="pixels are [3, 1, H, W] uint8")
    return Image.fromarray(pixels[:, 0].permute(1, 2, 0).cpu().numpy())


def fit_size(
    height: int,
    width: int,
    *,
    max_edge: int | None = None,
    max_area: int | None = None,
    multiple: int = 16,
    min_edge: int = 1,
) -> tuple[int, int]:
    """Size that keeps the aspect ratio, both edges multiples of ``multiple``; nothing grows beyond what that asks for.

    A frame of more than ``max_area`` pixels is scaled by the root of what is too much (the released preprocessing
    leaves the root out, and shrinks too far). Where rounding up still gives more, the edge steps down that leaves the
    aspect ratio closer to the frame's.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        max_edge: Most pixels of the longer edge; it goes before ``min_edge``. Null for no limit.
        max_area: Most pixels of the frame; it goes before ``min_edge``, too. Null for no limit.
        multiple: What both edges are multiples of; 16 is the VAE's stride times the patch size.
        min_edge: Least pixels of the shorter edge; a smaller frame is enlarged to it.

    Returns:
        Height and width.

    Raises:
        ConfigError: ``max_edge`` is smaller than ``multiple``, or ``max_area`` than its square.
    """
    if max_edge is not None and max_edge < multiple:
        raise ConfigError(f"max_edge {max_edge} is smaller than {multiple}", why=f"edges are multiples of {multiple}")
    if max_area is not None and max_area < multiple**2:
        raise ConfigError(f"max_area {max_area} is smaller than {multiple}^2", why=f"edges are multiples of {multiple}")
    most = math.inf if max_edge is None else max_edge / max(height, width)
    if max_area is not None:
        most = min(most, math.sqrt(max_area / (height * width)))
    scale = min(max(min(1.0, most), min_edge / min(height, width)), most)

    def fit(edge: int) -> int:
        fitted = max(1, round(edge * scale / multiple)) * multiple
        return fitted if max_edge is None else min(fitted, max_edge // multiple * multiple)

    def distortion(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] * width / (size[1] * height))) if min(size) else math.inf

    size = fit(height), fit(width)
    while max_area is not None and size[0] * size[1] > max_area:
        size = min((size[0] - multiple, size[1]), (size[0], size[1] - multiple), key=distortion)
    return size


def fit(media: Media, max_edge: int | None, min_edge: int = 1, max_area: int | None = None) -> Media:
    """Resize the pixels of an image or a clip as `fit_size` says; without limits edges are only rounded."""
    assert media.pixels is not None
    height, width = media.pixels.shape[2:]
    max_edge = max_edge or max(height, width, 16)
    size = fit_size(height, width, max_edge=max_edge, max_area=max_area, min_edge=min_edge)
    return replace(media, pixels=resize(media.pixels, *size))


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize ``[3, T, H, W]`` uint8 frames, bicubic and antialiased, a few frames at a time.

    Args:
        pixels: ``[3, T, H, W]`` uint8.
        height: New height.
        width: New width.

    Returns:
        ``[3, T, height, width]`` uint8, on the CPU when the size changed.
    """
    if pixels.shape[2:] == (height, width):
        return pixels
    chunk = max(1, (1 << 24) // max(math.prod(pixels.shape[2:]), height * width))
    out = torch.empty(3, pixels.shape[1], height, width, dtype=torch.uint8)
    for at in range(0, pixels.shape[1], chunk):
        # uint8 in channels-last is interpolated in integers, three times as fast as through floats.
        frames = pixels[:, at : at + chunk].cpu().transpose(0, 1).contiguous(memory_format=torch.channels_last)
        out[:, at : at + chunk] = F.interpolate(frames, size=(height, width), mode="bicubic", antialias=True).transpose(
            0, 1
        )
    return out


def restore(pixels: Tensor, source: dict[str, float]) -> Tensor:
    """Bring made frames back to the height, width and frame count of the clip they were made from.

    Padding is dropped; each frame of the source gets the made frame that is nearest in time.

    Args:
        pixels: ``[3, T, H, W]`` uint8, made from a clip that `read_video` sampled.
        source: ``Media.source`` of that clip.

    Returns:
        ``[3, frames, height, width]`` uint8; play it at ``source["fps"]``.
    """
    frames, made = int(source["frames"]), min(int(source.get("sampled", pixels.shape[1])), pixels.shape[1])
    nearest = torch.linspace(0, made - 1, frames, dtype=torch.float64).round().long()
    return resize(pixels, int(source["height"]), int(source["width"]))[:, nearest]

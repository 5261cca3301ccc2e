"""How large an output has to be, from the header of the source that it follows."""

import io
from pathlib import Path

from benchmarks.quality.interface import Expectation
from bernini.media import fit_size, frame_rule, image_size, probe_video
from bernini.presets import Settings

ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values for an image that lies on its side


def clip_like(file: Path, sizes: Settings, fps: float | None) -> Expectation:
    """A clip that follows a clip, as `bernini.inputs.read` samples and resizes it.

    Args:
        file: The source.
        sizes: Limits of frames and edges.
        fps: Frames per second; none for the source's own.

    Raises:
        DataError: The source is missing or damaged.
    """
    probed = probe_video(file)
    rate = fps or probed["fps"]
    frames = len(frame_rule(int(probed["frames"]), probed["fps"], rate, sizes.frames).indices)
    return Expectation(frames, *_fitted(int(probed["height"]), int(probed["width"]), sizes), rate)


def picture_like(data: bytes, where: str, sizes: Settings, frames: int = 1, fps: float = 0.0) -> Expectation:
    """An image that follows an image, or a clip that begins with it.

    Args:
        data: Bytes of the source.
        where: What to call it in an error.
        sizes: Limits of edges.
        frames: Frames of the output.
        fps: Its frames per second; 0 for an image.

    Raises:
        DataError: The source is damaged.
    """
    return Expectation(frames, *_fitted(*upright_size(data, where), sizes), fps)


def upright_size(data: bytes, where: str) -> tuple[int, int]:
    """Height and width in pixels of an image as it is read: upright.

    Raises:
        DataError: The image is damaged.
    """
    from PIL import Image

    height, width = image_size(data, where)
    with Image.open(io.BytesIO(data)) as image:
        turned = image.getexif().get(ORIENTATION) in TURNED
    return (width, height) if turned else (height, width)


def _fitted(height: int, width: int, sizes: Settings) -> tuple[int, int]:
    return fit_size(height, width, max_edge=sizes.max_edge, min_edge=sizes.min_edge)

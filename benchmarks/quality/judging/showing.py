"""What a judge sees: frames picked by number, resized and encoded in one fixed way, so that bytes can be hashed."""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bernini.decoding import Probe, decode_video
from bernini.errors import ConfigError, DataError
from bernini.media import encode_image, fit_size, read_image, resize

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Encoding:
    """How a frame is sent.

    Attributes:
        long_edge: Longest edge in pixels; larger frames shrink to it with their aspect ratio, smaller ones stay. Null
            keeps every size.
        quality: Of a JPEG, 1 to 95; null sends a PNG, which loses nothing.
    """

    long_edge: int | None = 512
    quality: int | None = None

    def __post_init__(self) -> None:
        if (self.long_edge is not None and self.long_edge < 1) or self.quality not in (None, *range(1, 96)):
            raise ConfigError(f"frames cannot be encoded as {self}", why="an edge is positive, a quality 1 to 95")

    @property
    def kind(self) -> str:
        """MIME type."""
        return "image/png" if self.quality is None else "image/jpeg"

    def encode(self, frame: Tensor) -> bytes:
        """Bytes of the file of a frame ``[3, 1, H, W]`` uint8."""
        frame = resize(frame, *fit_size(*frame.shape[2:], max_edge=self.long_edge, multiple=1))
        if self.quality is None:
            return encode_image(frame)
        from PIL import Image

        file = io.BytesIO()
        picture = Image.fromarray(frame[:, 0].permute(1, 2, 0).contiguous().numpy())
        picture.save(file, format="JPEG", quality=self.quality, subsampling=2, optimize=False)
        return file.getvalue()


@dataclass(frozen=True)
class Seen:
    """Frames as they are sent.

    Attributes:
        frames: Encoded files, in the order in which they are shown.
        kind: Their MIME type.
        fps: Frames per second at which they follow each other; 0 for pictures that stand by themselves.
    """

    frames: tuple[bytes, ...]
    kind: str
    fps: float = 0.0

    def described(self) -> dict[str, object]:
        """What tells it from anything else, plain JSON: hashes of the bytes, kind and rate."""
        hashes = [hashlib.sha256(frame).hexdigest() for frame in self.frames]
        return {"frames": hashes, "kind": self.kind, "fps": self.fps}


@dataclass(frozen=True, eq=False)
class Shown:
    """An image, or frames of a clip, still to be read.

    Attributes:
        source: File, pixels ``[3, T, H, W]`` uint8, or what gives them when they are shown.
        indices: Numbers of the frames, in the order in which they are shown; an image has frame 0 alone.
        fps: Frames per second at which the *picked* frames follow each other. A judge that reads clips is then shown
            one; 0 makes pictures of them that stand by themselves.
        encoding: How they are sent.
    """

    source: str | Path | Tensor | Callable[[], Tensor]
    indices: tuple[int, ...] = (0,)
    fps: float = 0.0
    encoding: Encoding = Encoding()

    def __post_init__(self) -> None:
        if not self.indices or min(self.indices) < 0 or self.fps < 0:
            raise ConfigError(
                f"frames {self.indices} at {self.fps} fps cannot be shown", why="there is one at least, from 0 on"
            )

    def see(self) -> Seen:
        """Read and encode the frames.

        Raises:
            DataError: The file is missing or damaged, or has fewer frames than are asked for.
        """
        source = self.source() if callable(self.source) else self.source
        frames = _read(source, self.indices)
        return Seen(tuple(map(self.encoding.encode, frames)), self.encoding.kind, self.fps)


def evenly(frames: int, count: int) -> tuple[int, ...]:
    """Numbers of ``count`` frames from the first to the last of ``frames``; a clip of fewer repeats some.

    It is ``numpy.linspace`` cut to integers, as harnesses have it. Exact division gives another frame here and there:
    of 27 frames, the 24th of 47 is 12 and not 13.
    """
    if frames < 1 or count < 1:
        raise ConfigError(f"cannot pick {count} of {frames} frames", why="both are at least 1")
    return tuple(np.linspace(0, frames - 1, count).astype(int).tolist())


def _read(source: str | Path | Tensor, indices: Sequence[int]) -> list[Tensor]:
    """Frames ``[3, 1, H, W]`` uint8."""
    if isinstance(source, Tensor):
        _check(indices, source.shape[1], "pixels")
        return [source[:, index : index + 1].cpu() for index in indices]
    path = Path(source)
    if path.suffix.lower() in IMAGES:
        _check(indices, 1, str(path))
        pixels = read_image(path).pixels
        assert pixels is not None
        return [pixels] * len(indices)
    kept = sorted(set(indices))

    def pick(probed: Probe) -> list[int]:
        _check(indices, probed.frames, str(path))
        return kept

    _, decoded = decode_video(path, pick, str(path))
    return [torch.from_numpy(decoded[kept.index(index)]).permute(2, 0, 1)[:, None] for index in indices]


def _check(indices: Sequence[int], frames: int, where: str) -> None:
    if max(indices) >= frames:
        raise DataError(
            f"frame {max(indices)} is to be shown, there are {frames}",
            where=where,
            why="frames count from 0, and no other frame takes the place of one that is missing",
            fix="make the clip as long as the benchmark asks for, or show frames that it has",
        )

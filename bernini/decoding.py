"""Frames of a video file by PyAV: what may be decoded is checked first, then nothing but the frames asked for is kept.

A file is read through a Python file, by the demuxer of its suffix, and decoded by the codecs of a short list: it can
name neither another file nor an address, and rare decoders, where most holes have been found, are never run. Neither
torch nor Pillow is imported here, so that a process of its own can decode (`datamodules.decoder`) without them.
"""

import errno
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from bernini.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

MAX_EDGE = 8192  # pixels; a header that claims more is refused before anything is allocated
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4")
_MP4, _MATROSKA = ("mov,mp4,m4a,3gp,3g2,mj2", "an MP4"), ("matroska,webm", "a Matroska file")
_DEMUXERS = {".mp4": _MP4, ".mov": _MP4, ".mkv": _MATROSKA, ".webm": _MATROSKA, ".avi": ("avi", "an AVI")}
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp")
_FASTEST = 60.0  # frames per second of a clip without a constant rate
_AGAIN = "encode the clip again, as H.264 in an MP4"


class OutOfMemory(DataError):
    """A file that takes more memory to decode than it may."""


@dataclass(frozen=True)
class Limits:
    """How much a file from a source that is not trusted may cost.

    Attributes:
        pixels: Most pixels of one frame.
        frames: Most frames of the file.
        seconds: Longest file in seconds.
        decoded: Most bytes of the frames that are kept.
        memory: Bytes of memory that decoding may take besides.
        timeout: Seconds that opening the file, and then decoding it, may take.
    """

    pixels: int = 1 << 25
    frames: int = 100_000
    seconds: float = 3600.0
    decoded: int = 1 << 30
    memory: int = 1 << 30
    timeout: float = 60.0


@dataclass(frozen=True)
class Probe:
    """What a file holds, without decoding it.

    Attributes:
        height: Height in pixels as stored, before any rotation.
        width: Width as stored.
        frames: Frames at the constant rate ``fps``.
        fps: Frames per second: the average or, where frames do not come at a constant rate, the highest, up to 60.
        codec: FFmpeg's name, such as ``h264``.
        stored: Where frames do not come at a constant rate, the stored frame that is nearest in time to each of
            ``frames``; null where each is itself.
    """

    height: int
    width: int
    frames: int
    fps: float
    codec: str
    stored: list[int] | None = None


Pick = Callable[[Probe], Sequence[int]]
Decode = Callable[[str | Path | bytes, Pick, str], tuple[Probe, np.ndarray]]


def decode_video(
    file: str | Path | bytes, pick: Pick, where: str, limits: Limits | None = None
) -> tuple[Probe, np.ndarray]:
    """Probe a file, have frames of it picked, and decode those in this process.

    Args:
        file: Path, or the bytes of an MP4.
        pick: Gives the frames to keep, ascending, each below ``Probe.frames``.
        where: What to call the file in an error.
        limits: What it may cost; null for a file that is trusted.

    Returns:
        What the file holds, and the frames, upright: ``[T, H, W, 3]`` uint8.

    Raises:
        DataError: The file is missing, damaged, of a kind that is not decoded or beyond a limit.
    """
    source, suffix = open_source(file, where)
    with source, open_video(source, suffix, where, limits) as video:
        return video.probed, video.decode(pick(video.probed))


def open_source(file: str | Path | bytes, where: str) -> tuple[BinaryIO, str]:
    """A file open for reading, and its suffix; bytes are those of an MP4.

    Raises:
        DataError: It is not there, or its suffix is not of a video.
    """
    if isinstance(file, bytes):
        return io.BytesIO(file), ".mp4"
    path = Path(file)
    if not path.is_file():
        raise DataError("the clip does not exist", where=where, fix="check the path; it is relative to its list")
    if path.suffix.lower() not in _DEMUXERS:
        why = f"the suffix of a clip is one of {', '.join(_DEMUXERS)}"
        raise DataError(f"the clip cannot be decoded: unknown suffix {path.suffix!r}", where=where, why=why, fix=_AGAIN)
    return path.open("rb"), path.suffix.lower()


class Video:
    """A video file that is open, and what it holds.

    Attributes:
        probed: What it holds.
    """

    def __init__(self, container: "InputContainer", stream: "VideoStream", where: str, limits: Limits | None) -> None:
        self._container, self._stream, self._where, self._limits = container, stream, where, limits
        self._first = 0
        self.probed = self._probe()

    def _probe(self) -> Probe:
        """Count the frames without decoding any."""
        stream, limits, where = self._stream, self._limits, self._where
        times: list[int | None] = []
        for number, packet in enumerate(self._container.demux(stream)):
            if number == 0:
                self._first = next((time for time in (packet.dts, packet.pts) if time is not None), 0)
            if _is_frame(packet, where):
                times.append(packet.pts)
                if limits and len(times) > limits.frames:
                    what = f"the clip has over {limits.frames} frames"
                    raise DataError(what, where=where, fix="cut it, or raise `limits.frames`")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if fps <= 0 or not times:
            raise DataError("the clip has no frames or no frame rate", where=where, fix=_AGAIN)
        probed = Probe(stream.height, stream.width, len(times), fps, stream.codec_context.name)
        if None in times or not stream.time_base:
            return probed
        seconds = np.sort(np.asarray(times, dtype=np.float64)) * float(stream.time_base)
        seconds -= seconds[0]
        if limits and seconds[-1] > limits.seconds:
            what, why = f"the clip lasts {seconds[-1]:.0f} seconds", f"the limit is {limits.seconds:g}"
            raise DataError(what, where=where, why=why, fix="cut it, or raise `limits.seconds`")
        return _at_constant_rate(probed, seconds)

    def decode(self, picked: Sequence[int], allocate: Callable[..., np.ndarray] = np.empty) -> np.ndarray:
        """Decode frames, from the start of the file, stopping at the first error.

        Args:
            picked: Frames to keep, ascending; one that is picked twice is decoded once.
            allocate: Called once with the shape, after it was checked, and ``uint8``.

        Returns:
            ``[T, H, W, 3]`` uint8, turned upright as the file says.

        Raises:
            DataError: The file is damaged, its frames are not what it said, or they are beyond a limit.
        """
        stored, where = self.probed.stored, self._where
        numbers = picked if stored is None else [stored[number] for number in picked]
        _check_decoded(len(numbers), self.probed.height, self.probed.width, self._limits, where)
        pixels: np.ndarray | None = None
        done = 0
        self._container.seek(self._first, stream=self._stream)
        for number, frame in enumerate(self._container.decode(self._stream)):
            if number != numbers[done]:
                continue
            if frame.rotation % 90:
                raise DataError(f"the clip is turned by {frame.rotation} degrees", where=where, fix=_AGAIN)
            upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
            if pixels is None:
                height, width, _ = upright.shape
                _check_decoded(len(numbers), height, width, self._limits, where)
                pixels = allocate((len(numbers), height, width, 3), np.uint8)
            if upright.shape != pixels.shape[1:]:
                raise DataError("the frame size changes inside the clip", where=where, fix=_AGAIN)
            while done < len(numbers) and numbers[done] == number:
                pixels[done] = upright
                done += 1
            if done == len(numbers):
                break
        if pixels is None or done < len(numbers):
            raise DataError(f"the clip ends at frame {done} of {len(numbers)}", where=where, fix=_AGAIN)
        return pixels


@contextmanager
def open_video(source: BinaryIO, suffix: str, where: str, limits: Limits | None = None) -> Iterator[Video]:
    """Open a file for decoding; what PyAV raises in the context becomes a `DataError`.

    Args:
        source: The file.
        suffix: Its suffix.
        where: What to call the file in an error.
        limits: What it may cost; null for a file that is trusted.

    Raises:
        DataError: The file is cut short, damaged, has no video or no frame, is of a kind that is not decoded, or is
            beyond a limit.
    """
    import av

    demuxer, kind = _DEMUXERS[suffix]
    _check_beginning(source, kind, where)
    # Names in a file lead nowhere, and no other decoder runs, not even to find a stream's size.
    options = {"format_whitelist": demuxer, "codec_whitelist": ",".join(CODECS), "protocol_whitelist": "none"}
    try:
        kind = demuxer.split(",")[0]
        with av.open(source, "r", format=kind, options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise DataError("the file has no video stream", where=where, fix="give a clip, or an image as `images`")
            stream = container.streams.video[0]
            codec = stream.codec_context.name if stream.codec_context else "of this file"
            if codec not in CODECS:
                raise DataError(
                    f"the codec {codec} is not allowed",
                    where=where, why=f"the codecs are {', '.join(CODECS)}", fix=_AGAIN,
                )  # fmt: skip
            check_size(stream.height, stream.width, where, limits)
            # Threads cost more than they save on small frames.
            stream.thread_type = "AUTO" if stream.height * stream.width > 256 * 256 else "NONE"
            most = limits.pixels if limits else MAX_EDGE**2
            # `explode`: else damaged blocks are painted over silently. `max_pixels`: a frame may tell another size.
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(most)}
            yield Video(container, stream, where, limits)
    except (av.FFmpegError, MemoryError) as error:
        fix = "play it, encode it again, or leave the sample out"
        if isinstance(error, MemoryError) or error.errno in (errno.ENOMEM, errno.EAGAIN):
            why = "it takes more than `limits.memory`, or than the machine has"
            raise OutOfMemory("the clip cannot be decoded: out of memory", where=where, why=why, fix=fix) from error
        what, why = f"the clip cannot be decoded: {error.strerror}", "it is damaged, cut short, or not a clip at all"
        raise DataError(what, where=where, why=why, fix=fix) from error


def _at_constant_rate(probed: Probe, seconds: np.ndarray) -> Probe:
    """Number the frames by time where they do not come at a constant rate: ``seconds``, ascending from 0."""
    steps = np.diff(seconds)
    even = np.arange(len(seconds)) * (steps.mean() if len(steps) else 0.0)
    if not len(steps) or steps.min() <= 0 or np.abs(seconds - even).max() <= steps.mean() / 2:
        return probed
    fps = max(probed.fps, min(_FASTEST, 1 / steps.min()))
    frames = round((seconds[-1] + 1 / fps) * fps)
    stored = np.searchsorted((seconds[1:] + seconds[:-1]) / 2, np.arange(frames) / fps, side="right")
    return replace(probed, frames=frames, fps=fps, stored=stored.tolist())


def _check_beginning(source: BinaryIO, kind: str, where: str) -> None:
    source.seek(0)
    start = source.read(12)
    source.seek(0)
    begins = {
        "an MP4": start[4:8] in _BOXES,
        "a Matroska file": start[:4] == b"\x1aE\xdf\xa3",
        "an AVI": start[:4] == b"RIFF" and start[8:] == b"AVI ",
    }
    if not begins[kind]:
        why = "playlists and other containers are not opened, whatever their name"
        raise DataError(
            f"the clip cannot be decoded: it does not begin as {kind} does", where=where, why=why, fix=_AGAIN
        )


def _is_frame(packet: Any, where: str) -> bool:
    if packet.is_corrupt:
        raise DataError("the clip is cut short", where=where, why="its end is missing", fix="copy or encode it again")
    return packet.size > 0 and not packet.is_discard


def check_size(height: int, width: int, where: str, limits: Limits | None = None) -> None:
    """Check the size of a frame, or of an image.

    Raises:
        DataError: It has no pixels, or more than the limit.
    """
    if not (0 < height <= MAX_EDGE and 0 < width <= MAX_EDGE):
        why = f"the edges may be 1 to {MAX_EDGE}"
        raise DataError(f"a frame of {width}x{height} pixels", where=where, why=why, fix="make it smaller")
    if limits and height * width > limits.pixels:
        why = f"the limit is {limits.pixels} pixels"
        raise DataError(f"a frame of {width}x{height} pixels", where=where, why=why, fix="raise `limits.pixels`")


def _check_decoded(frames: int, height: int, width: int, limits: Limits | None, where: str) -> None:
    size = 3 * frames * height * width
    if limits and size > limits.decoded:
        raise DataError(
            f"{frames} frames of {width}x{height} pixels are {size} bytes", where=where,
            why=f"the limit is {limits.decoded} bytes", fix="take fewer frames, or raise `limits.decoded`",
        )  # fmt: skip

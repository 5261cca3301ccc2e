"""Decoding and resizing a clip, by the process that may die, by this one, and by PyAV without anything around it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import BytesIO
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.protocol import Timing, interleave, noise
from bernini.decoding import Limits
from bernini.media import encode_video, fit_size, read_video, resize
from datamodules.decoder import Decoder

BARE, OURS = "bare PyAV", "ours, own process"
CPU = torch.device("cpu")


def make_clip(frames: int, height: int, width: int) -> bytes:
    """An H.264 MP4 at 16 fps of a textured plane that drifts and turns brighter, with the noise of a camera."""
    rng = np.random.default_rng(0)
    texture = rng.integers(40, 160, (1, 3, (height + frames) // 8 + 1, (width + 2 * frames) // 8 + 1))
    large = F.interpolate(torch.from_numpy(texture).float(), scale_factor=8, mode="bicubic")[0]
    made = [
        large[:, t : t + height, 2 * t : 2 * t + width] + t + torch.from_numpy(rng.normal(0, 3, (3, height, width)))
        for t in range(frames)
    ]
    return encode_video(torch.stack(made, 1).clamp(0, 255).to(torch.uint8), 16)


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process, and those that it starts, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def bare(data: bytes) -> Tensor:
    """``[3, T, H, W]`` uint8: every frame of a clip, in the fewest lines."""
    with av.open(BytesIO(data), "r") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)


def measure(
    frames: int, size: tuple[int, int], max_edge: int, rounds: int, warmup: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Check that all make the same pixels, then time them on one core.

    Args:
        frames: Frames of the clip, ``4k + 1``.
        size: Height and width of the clip in pixels.
        max_edge: Longest edge that it is resized to.
        rounds: Timed calls of each.
        warmup: Untimed calls of each.
        say: Told what goes on.

    Returns:
        Frames per second of each, and their share of bare PyAV's.

    Raises:
        RuntimeError: Pixels differ.
    """
    data, (height, width) = make_clip(frames, *size), fit_size(*size, max_edge=max_edge)
    say(f"{frames} frames of {size[0]}x{size[1]} pixels, {len(data) / 1e6:.2f} MB; resized to {height}x{width}")
    child = Decoder(Limits())
    threads = torch.get_num_threads()
    calls: dict[str, Callable[[], Tensor]] = {
        BARE: lambda: resize(bare(data), height, width),
        "ours, this process": lambda: resize(_pixels(read_video(data)), height, width),
        OURS: lambda: resize(_pixels(read_video(data, decode=child)), height, width),
    }
    try:
        with one_core():
            torch.set_num_threads(1)
            expected = calls[BARE]()
            for name, call in calls.items():
                if not torch.equal(call(), expected):
                    raise RuntimeError(f"{name} makes other pixels than {BARE}")
                for _ in range(warmup):
                    call()
            samples = interleave(calls, rounds, CPU)
    finally:
        torch.set_num_threads(threads)
        child.close()
    timings = {name: Timing.of(s.ms for s in taken) for name, taken in samples.items()}
    return {
        "clip": {"frames": frames, "size": size, "bytes": len(data), "resized": (height, width)},
        "contestants": {
            name: {
                "ms": asdict(timing),
                "frames_per_second": 1e3 * frames / timing.median,
                "of_bare": timings[BARE].median / timing.median,
            }
            for name, timing in timings.items()
        },
        "noise": noise(samples),
    }


def _pixels(media: Any) -> Tensor:
    return media.pixels

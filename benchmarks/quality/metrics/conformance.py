"""Whether an output is what was asked for: its number of frames, size and rate."""

from torch import Tensor

from benchmarks.quality.interface import Expectation
from benchmarks.quality.metrics.clips import check_clip


def deviations(clip: Tensor, fps: float, expect: Expectation) -> dict[str, tuple[float, float]]:
    """What differs from what was asked for; empty if nothing does.

    Args:
        clip: ``[3, T, H, W]`` uint8.
        fps: Its frames per second; 0 for an image.
        expect: What was asked for.

    Returns:
        What is and what was to be, by ``frames``, ``height``, ``width`` and ``fps``, which may be off by 0.0005.

    Raises:
        DataError: It is no such clip.
    """
    check_clip(clip)
    found = {"frames": clip.shape[1], "height": clip.shape[2], "width": clip.shape[3]}
    wanted = {"frames": expect.frames, "height": expect.height, "width": expect.width}
    differ: dict[str, tuple[float, float]] = {
        name: (found[name], wanted[name]) for name in found if found[name] != wanted[name]
    }
    if abs(fps - expect.fps) > 5e-4:
        differ["fps"] = (fps, expect.fps)
    return differ

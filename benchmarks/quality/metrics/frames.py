"""Which frames of a clip each benchmark looks at: numbers from 0, nothing else."""

from itertools import pairwise

import numpy as np

from bernini.errors import DataError


def middle(n: int, count: int) -> list[int]:
    """VBench's sampling: the middle of each of ``count`` stretches; of shorter clips all frames, then the last again.

    Source: Vchitect/VBench, `get_frame_indices` in `vbench/utils.py`.
    """
    _check(n)
    ends = np.linspace(0, n, min(count, n) + 1).astype(int).tolist()
    taken = [(first + end - 1) // 2 for first, end in pairwise(ends)]
    return taken + taken[-1:] * (count - len(taken))


def dynamic_degree(n: int, fps: float) -> list[int]:
    """VBench's frames for dynamic degree: about 8 per second. Source: Vchitect/VBench, `vbench/dynamic_degree.py`."""
    _check(n)
    return list(range(0, n, interval(fps)))


def interval(fps: float) -> int:
    """Frames from one to the next at about 8 per second; halves are rounded to even, so that 20 fps gives 2."""
    return max(1, round(fps / 8))


def editverse_judged(n: int, source: int) -> list[int]:
    """EditVerseBench's frames for the judge: ``range(0, n, n // 3)``, 3 frames only if 3 divides n.

    The same numbers are taken of the source. Source: adobe-research/EditVerse,
    `automatic_evaluation/editing_vlm_evaluation.py`.

    Args:
        n: Frames of the output; at least 3.
        source: Frames of the source.

    Raises:
        DataError: The output is too short, or the source ends before the last of the frames.
    """
    _check(n, 3)
    taken = list(range(0, n, n // 3))
    if taken[-1] >= source:
        raise DataError(f"frame {taken[-1]} is judged, and the source has {source} frames", why=f"the output has {n}")
    return taken


def editverse_text(n: int, count: int = 8) -> list[int]:
    """EditVerseBench's frames for the alignment of video and text: the first of each of 8 stretches.

    Source: adobe-research/EditVerse, `automatic_evaluation/video_text_alignment.py`.
    """
    _check(n)
    return [int(i * n / count) for i in range(count)]


def evenly(n: int, count: int = 32) -> list[int]:
    """OpenS2V-Eval's frames for all scores but the natural one: evenly from the first to the last."""
    _check(n)
    return np.linspace(0, n - 1, count, dtype=int).tolist()


def opens2v_judged(n: int, count: int = 16) -> list[int]:
    """OpenS2V-Eval's frames for the natural score: as far apart as ``count`` fit, from the first; of fewer frames all.

    Source: OpenS2V-Nexus, `eval/get_naturalscore.py`.
    """
    _check(n)
    return list(range(0, n, max(n // count, 1)))[:count]


def windows(n: int, size: int = 3) -> list[list[int]]:
    """OpenS2V-Eval's windows for motion smoothness, one around each frame; version 1.1.

    Where a clip begins, the first frame fills the window; where it ends, the window's own first frame is repeated.
    Source: OpenS2V-Nexus, `eval/get_motion_smoothness.py`.
    """
    _check(n)
    left = (size - 1) // 2
    found = []
    for middle_ in range(n):
        first, end = max(0, middle_ - left), min(n, middle_ + size - left)
        inside, missing = list(range(first, end)), size - (end - first)
        if middle_ < left:
            found.append([0] * size)
        else:
            found.append(inside + [inside[-1]] * missing if first == 0 else [first] * missing + inside)
    return found


def five_compared(n: int, stride: int = 8) -> list[int]:
    """FiVE's frames for the conventional metrics. Source: FiVE-Bench, `evaluation/evaluate.py`."""
    _check(n)
    return list(range(0, n, stride))


def five_judged(n: int, count: int = 4) -> list[int]:
    """FiVE-Acc's frames out of ``n >= count``: not ``count`` of them, as its setting is called, but about so far apart.

    Source: FiVE-Bench, `evaluation/metrics_calculator.py`, for folders of frames.
    """
    _check(n, count)
    stride = n // (n // count)
    return list(range(stride // 2, n, stride))


def _check(n: int, least: int = 1) -> None:
    if n < least:
        raise DataError(f"a clip has {n} frames, at least {least} are needed")

"""How much a clip moves: flicker, frames that repeat, optical flow, and what follows from flow that was measured."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.metrics.clips import check_clip
from bernini.errors import ConfigError, DataError

FLOW_WIDTH = 16
"""Columns that OpenS2V-Eval shrinks a flow map to."""


def steps(clip: Tensor) -> Tensor:
    """Mean absolute difference of each frame from the one before, in levels of 255.

    Args:
        clip: ``[3, T, H, W]`` uint8.

    Returns:
        ``[T - 1]`` float64.

    Raises:
        DataError: There are fewer than two frames.
    """
    check_clip(clip, 2)
    pairs = range(1, clip.shape[1])
    return torch.stack([(clip[:, t].int() - clip[:, t - 1].int()).abs().double().mean() for t in pairs])


def temporal_flickering(clip: Tensor) -> float:
    """VBench's temporal flickering of ``[3, T, H, W]`` uint8, in [0, 1]; 1 if nothing changes.

    It is meant for clips that are static by their prompt. Source: Vchitect/VBench, `vbench/temporal_flickering.py`.

    Raises:
        DataError: There are fewer than two frames.
    """
    return (255 - steps(clip).mean().item()) / 255


def duplicates(clip: Tensor, levels: float = 0.0) -> list[int]:
    """Numbers of the frames that repeat the one before.

    Args:
        clip: ``[3, T, H, W]`` uint8.
        levels: Largest mean difference in levels of 255 that is a repetition; about 0.5 for clips that were encoded.

    Raises:
        DataError: There are fewer than two frames.
    """
    return [t for t, step in enumerate(steps(clip).tolist(), 1) if step <= levels]


def is_static(clip: Tensor, levels: float = 0.0) -> bool:
    """Whether no frame differs from the first by more in the mean than ``levels`` of 255.

    Args:
        clip: ``[3, T, H, W]`` uint8.
        levels: As of `duplicates`.

    Raises:
        DataError: There are fewer than two frames.
    """
    check_clip(clip, 2)
    first = clip[:, 0].int()
    return all((clip[:, t].int() - first).abs().double().mean() <= levels for t in range(1, clip.shape[1]))


def motion_amplitude(clip: Tensor) -> float:
    """OpenS2V-Eval's motion amplitude of ``[3, T, H, W]`` uint8, in pixels a frame, before it is clipped to 1.

    Farneback's flow between neighbours, shrunk to 16 columns, averaged over time, then over places and both directions
    with their signs: motion to and fro, or to the left and up as much as to the right and down, is 0. As in the
    official script, grey is made of RGB with the weights of BGR. Source: OpenS2V-Nexus, `eval/get_motion_amplitude.py`.

    Raises:
        ConfigError: OpenCV is not installed.
        DataError: There are fewer than two frames, or they are over 16 times as wide as high.
    """
    check_clip(clip, 2)
    try:
        import cv2
    except ImportError as error:
        raise ConfigError(
            "motion amplitude needs OpenCV", why="its flow is Farneback's", fix="pip install 'bernini[bench]'"
        ) from error
    height, width = clip.shape[2:]
    size = FLOW_WIDTH, int(height * (FLOW_WIDTH / width))
    if not size[1]:
        raise DataError(f"a clip is {tuple(clip.shape)}", why=f"at {FLOW_WIDTH} columns it has no row")
    frames = clip.permute(1, 2, 3, 0).contiguous().numpy()
    grey = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in frames]
    empty, whole = np.zeros((height, width, 2), np.float32), np.zeros((size[1], FLOW_WIDTH, 2), np.float64)
    for before, after in pairwise(grey):
        flow = cv2.calcOpticalFlowFarneback(before, after, empty, 0.5, 3, 15, 3, 5, 1.2, 0)
        whole += cv2.resize(flow, size, interpolation=cv2.INTER_AREA)
    return abs(float((whole / (len(grey) - 1)).mean()))


def is_dynamic(magnitudes: Sequence[float], height: int, width: int, fps: float) -> bool:
    """VBench's decision whether a clip moves, from optical flow that was measured at about 8 frames per second.

    Source: Vchitect/VBench, `vbench/dynamic_degree.py`. Two frames always move: a quarter of two,
    rounded to even, is no pair at all.

    Args:
        magnitudes: Of each pair of neighbours, the mean of the largest 5 % of lengths of flow, in pixels.
        height: Of the frames, in pixels.
        width: Of the frames, in pixels.
        fps: Of the file.

    Raises:
        DataError: There is no pair.
    """
    if not magnitudes:
        raise DataError("a clip of one frame does not move", why="flow is between two frames")
    threshold = max(1.0, 8.0 / fps) * 6.0 * (min(height, width) / 256.0)
    needed = round(4 * ((len(magnitudes) + 1) / 16.0))
    return sum(length > threshold for length in magnitudes) >= needed


def stands_still(magnitudes: Sequence[float], ends: tuple[float, float], height: int, width: int) -> bool:
    """VBench's decision whether a clip is scored for temporal flickering, from optical flow between frames of the file.

    Source: Vchitect/VBench, `static_filter.py`. Of the 25 clips of a prompt, in the order of their names as text (0, 1,
    10, 11, ... 2, 20), the first five that stand still are kept, and get the numbers 0 to 4; with fewer, it warns.

    Args:
        magnitudes: Of each pair of neighbours, the mean of the largest 2 % of lengths of flow, in pixels.
        ends: The same from the first frame to the last, and back.
        height: Of the frames, in pixels.
        width: Of the frames, in pixels.

    Raises:
        DataError: There is no pair.
    """
    if not magnitudes:
        raise DataError("a clip of one frame neither moves nor stands still", why="flow is between two frames")
    threshold = 3.0 * (min(height, width) / 256.0)
    allowed = round(2 * ((len(magnitudes) + 1) / 16.0))
    moving = sum(length > threshold for length in magnitudes)
    return moving <= allowed and max(ends) <= 2 * threshold * allowed


def smoothness(scores: Sequence[float], threshold: float = 0.025) -> float:
    """OpenS2V-Eval's motion smoothness, version 1.1, in [0, 1]: the share of frames without a jump of quality.

    Source: OpenS2V-Nexus, `eval/get_motion_smoothness.py`.

    Args:
        scores: Quality of the window around each frame (`frames.windows`), in [0, 1].
        threshold: Largest difference of neighbours that is no jump; both sides of a jump are artefacts.

    Raises:
        DataError: There are no scores.
    """
    if not scores:
        raise DataError("smoothness needs the score of each frame's window")
    jumps = [t for t in range(1, len(scores)) if abs(scores[t] - scores[t - 1]) > threshold]
    return 1 - len({frame for t in jumps for frame in (t - 1, t)}) / len(scores)

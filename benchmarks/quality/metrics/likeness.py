"""Figures of features that a model gives: how alike frames are to each other, to an image, to a text.

Features are ``[T, D]``, one row a frame; a cosine below 0 counts as 0 where it says so.
"""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from bernini.errors import DataError


def consistency(features: Tensor) -> float:
    """VBench's consistency, in [0, 1]: the mean likeness of each frame to the one before and to the first.

    Negative cosines count as 0. Source: Vchitect/VBench, `vbench/subject_consistency.py` and
    `vbench/background_consistency.py`.

    Raises:
        DataError: There are fewer than two frames.
    """
    _check(features)
    to_first = cosines(features[1:], features[:1]).clamp(min=0)
    return ((_to_last(features) + to_first) / 2).mean().item()


def adjacent(features: Tensor) -> float:
    """Mean likeness of neighbours, in [0, 1]; negative cosines count as 0.

    Source: adobe-research/EditVerse, `automatic_evaluation/clip_temporal_consistency.py`.

    Raises:
        DataError: There are fewer than two frames.
    """
    _check(features)
    return _to_last(features).mean().item()


def conformity(image: Tensor, features: Tensor) -> float:
    """VBench-I2V's likeness to a given image ``[1, D]``, in [0, 1].

    0.4 of the best likeness of a frame to the image, 0.3 of the mean and 0.3 of the least likeness of neighbours;
    negative cosines count as 0. Source: the package vbench 0.1.5, `vbench2_beta_i2v/i2v_subject.py`; older versions
    weigh otherwise.

    Raises:
        DataError: There are fewer than two frames.
    """
    _check(features)
    best, between = cosines(features, image).clamp(min=0).max(), _to_last(features)
    return (0.4 * best + 0.3 * between.mean() + 0.3 * between.min()).item()


def structure_distance(output: Tensor, source: Tensor) -> float:
    """FiVE's structure distance of two images: squared error of how alike their places are among themselves.

    Source: FiVE-Bench, `evaluation/metrics_calculator.py`.

    Args:
        output: Keys of attention ``[P, D]``, one row a place.
        source: As many of the other image.
    """
    return mse_loss(cosines(output, output), cosines(source, source)).item()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines ``[N, M]`` of all pairs of rows ``[N, D]`` and ``[M, D]``, in [-1, 1]."""
    return (normalize(a.double(), dim=-1) @ normalize(b.double(), dim=-1).T).clamp(-1, 1)


def _to_last(features: Tensor) -> Tensor:
    return torch.cosine_similarity(features[1:].double(), features[:-1].double(), dim=-1).clamp(0, 1)


def _check(features: Tensor) -> None:
    if len(features) < 2:
        raise DataError(f"a clip has {len(features)} frames, at least 2 are needed", why="neighbours are compared")

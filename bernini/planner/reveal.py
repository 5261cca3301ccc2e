"""When and in which order masked planning reveals target tokens.

An order is read from its end: while ``m`` tokens stay masked these are ``order[:m]``, as in the released loop.
"""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bernini.errors import ConfigError
from bernini.planner.flow_head import FlowHead

Order = Literal["random", "halton", "confidence"]


def reveal_counts(tokens: int, steps: int) -> list[int]:
    """Tokens that each step reveals, by the cosine schedule of MaskGIT (arXiv 2202.04200).

    After step k of K (from 0) ``floor(N cos(pi / 2 (k + 1) / K))`` tokens stay masked, if that is fewer than before,
    and at least one; the last step reveals the rest. With more steps than tokens, some reveal none.

    Args:
        tokens: Target tokens N.
        steps: Steps K.

    Returns:
        ``steps`` counts whose sum is ``tokens``.

    Raises:
        ConfigError: There is no step, or no token.
    """
    if steps < 1 or tokens < 1:
        raise ConfigError(f"{steps} planning steps for {tokens} target tokens", why="there has to be one of each")
    left = [tokens]
    for step in range(1, steps):
        wanted = math.floor(tokens * math.cos(math.pi / 2 * step / steps))
        left.append(max(1, min(left[-1] - 1, wanted)))
    return [before - after for before, after in zip(left, [*left[1:], 0], strict=True)]


def reveal_order(
    tokens: int, seed: int, how: Literal["random", "halton"] = "random", grid: tuple[int, int, int] | None = None
) -> Tensor:
    """An order that is fixed before planning starts.

    Args:
        tokens: Target tokens N.
        seed: Seed of the shuffle, or of the rotation of the Halton points.
        how: ``random`` is the released shuffle, by NumPy's legacy generator. ``halton`` spreads every prefix of the
            reveal evenly over the target, in space and time: cells in the order in which a Halton sequence first falls
            into them, as arXiv 2503.17076 does for images.
        grid: ``(t, h, w)`` of the target in tokens, which ``halton`` needs.

    Returns:
        ``[N]`` int64 permutation, revealed from its end.

    Raises:
        ConfigError: ``halton`` without a grid of N tokens.
    """
    if how == "random":
        order = np.arange(tokens)
        np.random.RandomState(seed).shuffle(order)
        return torch.from_numpy(order)
    if grid is None or math.prod(grid) != tokens:
        raise ConfigError(f"order halton for {tokens} target tokens on a grid of {grid}", fix="give the target's grid")
    return torch.from_numpy(_halton_cells(grid, seed)[::-1].copy())


def _halton_cells(grid: tuple[int, int, int], seed: int) -> np.ndarray:
    rotation = np.random.RandomState(seed).random_sample(3)
    draws, cells = 2 * math.prod(grid), np.empty(0, int)
    while len(cells) < math.prod(grid):  # the sequence is dense, so it reaches every cell
        points = np.stack([_radical_inverse(np.arange(draws), base) for base in (5, 3, 2)], 1)
        t, h, w = ((points + rotation) % 1 * grid).astype(int).T
        visited = np.ravel_multi_index((t, h, w), grid)
        cells = visited[np.sort(np.unique(visited, return_index=True)[1])]
        draws *= 2
    return cells


def _radical_inverse(index: np.ndarray, base: int) -> np.ndarray:
    """Mirror the digits of each index at the decimal point: one axis of a Halton sequence, in [0, 1)."""
    value, unit = np.zeros(len(index)), 1.0
    while index.any():
        index, digit = np.divmod(index, base)
        unit /= base
        value += digit * unit
    return value


def uncertainty(flow_head: FlowHead, condition: Tensor, noise: Tensor) -> Tensor:
    """How unsure the flow head is of each token, by two evaluations that need no sample: the order ``confidence``.

    From pure noise, which tells nothing, the head's estimate of the clean embedding is its mean under the condition.
    Shown that mean under half noise, a sure head repeats itself and an unsure one follows the noise: the squared
    distance of the two estimates. For a Gaussian of variance ``v`` it is ``(v / (1 + v))^2 |noise|^2``, so it ranks
    tokens by variance.

    Args:
        flow_head: The flow head.
        condition: ``[..., Z]`` of the tokens.
        noise: ``[C]``, one for all tokens, which are thus compared on equal terms.

    Returns:
        ``[...]`` fp32, mean over channels.
    """
    pure, half = noise.new_tensor([1000.0]), noise.new_tensor([500.0])  # timesteps
    mean = noise - flow_head(noise[None], pure, condition).float()
    seen = (mean + noise) / 2
    estimate = seen - flow_head(seen, half, condition).float() / 2
    return (estimate - mean).square().mean(-1)

"""Human votes between pairs of models: Bradley-Terry scores, their bootstrap, and what they say of winning.

Source: Bradley and Terry (1952); scores are on the scale of Elo (a factor of 10 in odds is 400 points) around 1000.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.totals.rules import Rule
from bernini.errors import DataError

CENTRE, SCALE = 1000.0, 400.0
Floats = NDArray[np.float64]


class Vote(NamedTuple):
    """One comparison of two models' outputs for the same item."""

    first: str
    second: str
    better: Literal["first", "second", "tie"]


class Standing(NamedTuple):
    """Where a model stands.

    Attributes:
        score: Bradley-Terry score; the mean of all models is 1000.
        low: Lower end of its 95 % interval.
        high: Upper end.
        win_percent: Chance of winning against a model of score 1000.
        wins: Comparisons won.
        losses: Comparisons lost.
        ties: Comparisons that were neither.
    """

    score: float
    low: float
    high: float
    win_percent: float
    wins: int
    losses: int
    ties: int


def win_percent(score: float) -> float:
    """Chance in per cent of winning against a model of score 1000."""
    return 100 / (1 + 10 ** ((CENTRE - score) / SCALE))


RULES = (Rule("win_pct", ("score",), lambda row: win_percent(row["score"])),)


def standings(votes: Sequence[Vote], *, draws: int = 1000, seed: int = 0) -> dict[str, Standing]:
    """Scores of all models, best first; a tie is half a win for either.

    Args:
        votes: The comparisons.
        draws: Samples of the bootstrap, which draws votes with replacement; at least 1.
        seed: Of the bootstrap.

    Raises:
        DataError: A vote is of a model with itself, the models cannot be compared (one, or a group of them, has won or
            lost all its comparisons with the others), or more than 1 % of the draws are so.
    """
    names = sorted({name for vote in votes for name in (vote.first, vote.second)})
    if not names or any(vote.first == vote.second for vote in votes):
        raise DataError("there are no votes" if not names else "a vote is of a model with itself")
    number = {name: index for index, name in enumerate(names)}
    k = len(names)
    half = {"first": 2, "second": 0, "tie": 1}  # half wins of the first
    cells = np.array([(number[v.first] * k + number[v.second]) * 3 + half[v.better] for v in votes])
    kinds, counts = np.unique(cells, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(votes), counts / len(votes), size=draws)
    wins = _wins(np.vstack([counts, drawn]), kinds, k)
    comparable = _comparable(wins)
    if not comparable[0]:
        raise DataError(
            "the models cannot be compared",
            why="one of them, or a group, has won or lost every comparison with the others",
            fix="collect votes between them, or leave it out",
        )
    if (bad := int((~comparable[1:]).sum())) > draws / 100:
        raise DataError(f"in {bad} of {draws} draws models cannot be compared", why="there are too few votes")
    scores = CENTRE + SCALE / math.log(10) * _fit(wins[comparable])
    low, high = np.percentile(scores[1:], (2.5, 97.5), axis=0)
    found = {}
    for name in sorted(names, key=lambda name: -scores[0, number[name]]):
        i = number[name]
        outcomes = [(v.better, v.first == name) for v in votes if name in (v.first, v.second)]
        ties = sum(better == "tie" for better, _ in outcomes)
        won = sum(better == ("first" if first else "second") for better, first in outcomes)
        score = float(scores[0, i])
        figures = (score, float(low[i]), float(high[i]), win_percent(score))
        found[name] = Standing(*figures, won, len(outcomes) - ties - won, ties)
    return found


def _wins(counts: NDArray[np.int64], kinds: NDArray[np.int64], k: int) -> Floats:
    """``[draws, k, k]``: how often each model has beaten each other one, ties as halves."""
    pair, half = np.divmod(kinds, 3)
    first, second = np.divmod(pair, k)
    wins = np.zeros((len(counts), k, k))
    for column, i, j, h in zip(counts.T, first, second, half, strict=True):
        wins[:, i, j] += column * h / 2
        wins[:, j, i] += column * (2 - h) / 2
    return wins


def _comparable(wins: Floats) -> NDArray[np.bool_]:
    """``[draws]``: whether each model leads to each other one by a chain of wins, so that finite scores exist."""
    reach = (wins > 0) | np.eye(wins.shape[1], dtype=bool)
    for _ in range(wins.shape[1].bit_length()):
        reach = (reach.astype(np.float64) @ reach) > 0
    return np.all(reach, axis=(1, 2))


def _fit(wins: Floats) -> Floats:
    """``[draws, k]`` log strengths of largest likelihood, of mean 0, by Newton's method with halved steps."""
    games = wins + wins.transpose(0, 2, 1)
    theta = np.zeros(wins.shape[:2])

    def likelihood(theta: Floats) -> Floats:
        return -(wins * np.logaddexp(0, theta[:, None, :] - theta[:, :, None])).sum((1, 2))

    for _ in range(100):
        chance = 1 / (1 + np.exp(theta[:, None, :] - theta[:, :, None]))  # of the row's model against the column's
        gradient = (wins - games * chance).sum(2)
        if np.abs(gradient).max() < 1e-9 * max(1.0, games.max()):
            break
        curvature = games * chance * (1 - chance)
        hessian = np.eye(wins.shape[1]) * curvature.sum(2)[:, :, None] - curvature
        step = np.linalg.solve(hessian + 1 / wins.shape[1], gradient[:, :, None])[:, :, 0]  # the mean stays as it is
        before, size = likelihood(theta), np.ones(len(theta))
        while (worse := likelihood(theta + size[:, None] * step) < before - 1e-12 * np.abs(before)).any():
            size[worse] /= 2
        theta += size[:, None] * step
    return theta - theta.mean(1, keepdims=True)

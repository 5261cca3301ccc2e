"""Packs: samples laid end to end under a budget of tokens, at equal cost on every rank of a step.

A window of the order, some tens of steps long, is packed by itself, as a pure function of the sizes in it. Within it
samples change places, so that packs are full and the packs of one step cost the same; none leaves the window.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bernini.errors import DataError
from datamodules.order import permutation

CROSSOVER = 29_184  # tokens, for the 14B shape: 3 * 5120 + 13824


def cost(tokens: np.ndarray, crossover: int = CROSSOVER) -> np.ndarray:
    """Cost of samples, in tokens of a sample so short that its attention costs nothing.

    A block of width d and feed-forward width f takes ``12 d^2 + 4 d f`` FLOP a token for its projections, and in a
    sample of n tokens ``4 n d`` for attention. A sample therefore costs ``n (1 + n / (3 d + f))``. Attention to the
    text, a few per cent, is left out.

    Args:
        tokens: Tokens of each sample.
        crossover: ``3 d + f``, the length at which attention costs as much as all else.
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    return tokens * (1 + tokens / crossover)


@dataclass(frozen=True)
class Step:
    """The packs of one step.

    Attributes:
        packs: Places in the window of the samples of each pack.
        tokens: Tokens of each pack.
        costs: Cost of each pack.
    """

    packs: list[list[int]]
    tokens: list[int]
    costs: list[float]


def pack_window(
    tokens: Sequence[int], budget: int, packs: int, seed: Sequence[int], crossover: int = CROSSOVER
) -> list[Step]:
    """Pack the samples of a window into steps of equally many packs.

    Samples go, the largest first, into the fullest pack that still takes them (best fit decreasing). What is over when
    the packs are counted off into steps is spread over one step more. The packs are sorted by cost, those that cost
    alike become a step, and within a step samples change packs while that evens out their costs. The steps then come
    in a random order, so that cheap ones do not come first.

    Args:
        tokens: Tokens of each sample; at least ``packs`` samples.
        budget: Most tokens of a pack.
        packs: Packs of a step.
        seed: Key of the order of the steps.
        crossover: See `cost`.

    Returns:
        The steps. Every place in the window is in one pack and no pack is empty; only where the samples that are over
        are fewer than ``packs``, each nearly a pack of its own, are they left out of this epoch.

    Raises:
        DataError: A sample has more tokens than the budget, or there are fewer samples than packs.
    """
    if len(tokens) < packs or max(tokens) > budget:
        raise DataError(
            f"{len(tokens)} samples of up to {max(tokens, default=0)} tokens do not fill {packs} packs of {budget}",
            fix="raise the token budget, or bound the sizes of clips",
        )
    sizes, costs = np.asarray(tokens), cost(np.asarray(tokens), crossover)
    bins = _best_fit(sizes, budget)
    last = _last_step(bins, sizes, costs, budget, packs)
    bins.sort(key=lambda places: (costs[places].sum(), places))
    groups = [bins[first : first + packs] for first in range(0, len(bins), packs)] + ([last] if last else [])
    steps = []
    for group in groups:
        _even_out(group, sizes, costs, budget)
        steps.append(Step(group, [int(sizes[p].sum()) for p in group], [float(costs[p].sum()) for p in group]))
    return [steps[number] for number in permutation(seed[0], seed[1], len(steps), *seed[2:])]


def _best_fit(sizes: np.ndarray, budget: int) -> list[list[int]]:
    """Places by pack: the largest sample first, each into the fullest pack that takes it."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens that a pack still takes, and its number; ascending
    for place in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[place])
        at = bisect_left(room, (size, -1))
        if at < len(room):
            left, number = room.pop(at)
        else:
            left, number = budget, len(bins)
            bins.append([])
        bins[number].append(place)
        insort(room, (left - size, number))
    return bins


def _last_step(bins: list[list[int]], sizes: np.ndarray, costs: np.ndarray, budget: int, packs: int) -> list[list[int]]:
    """Take packs away until the rest are whole steps, and spread their samples over the packs of one step.

    Those with the most samples are spread, the dearest sample first and always to the cheapest pack with room.
    """
    if not (over := len(bins) % packs):
        return []
    bins.sort(key=lambda places: (len(places), places))
    spread = [place for places in bins[-over:] for place in places]
    del bins[-over:]
    if len(spread) < packs:  # hardly more samples than packs; the order has them again in another epoch
        return []
    even: list[list[int]] = [[] for _ in range(packs)]
    totals, room = np.zeros(packs), np.full(packs, budget)
    for place in sorted(spread, key=lambda place: (-costs[place], place)):
        number = int(np.argmin(np.where(room >= sizes[place], totals, np.inf)))
        even[number].append(place)
        totals[number] += costs[place]
        room[number] -= sizes[place]
    return even


def _even_out(group: list[list[int]], sizes: np.ndarray, costs: np.ndarray, budget: int) -> None:
    """Exchange samples of the dearest and the cheapest pack of a step while that brings their costs closer."""
    totals = [float(costs[places].sum()) for places in group]
    while True:
        dear, cheap = int(np.argmax(totals)), int(np.argmin(totals))
        if not _exchange(group[dear], group[cheap], totals[dear] - totals[cheap], sizes, costs, budget):
            return
        totals[dear], totals[cheap] = (float(costs[group[number]].sum()) for number in (dear, cheap))


def _exchange(dear: list[int], cheap: list[int], gap: float, sizes: np.ndarray, costs: np.ndarray, budget: int) -> bool:
    """Exchange the two samples, or move the one, that leave the least of the gap, if that is much less of it."""
    # A row more and a column more stand for nothing: a sample then moves without another in exchange.
    shift = np.append(costs[dear], 0.0)[:, None] - np.append(costs[cheap], 0.0)[None, :]
    growth = np.append(sizes[dear], 0)[:, None] - np.append(sizes[cheap], 0)[None, :]
    fits = (growth <= budget - sizes[cheap].sum()) & (-growth <= budget - sizes[dear].sum())
    if len(dear) == 1:
        fits[0, -1] = False
    left = np.where(fits, np.abs(gap - 2 * shift), np.inf)
    given, taken = divmod(int(np.argmin(left)), left.shape[1])
    if left[given, taken] >= 0.9 * gap:
        return False
    moved = [dear.pop(given)] if given < len(dear) else []
    dear.extend([cheap.pop(taken)] if taken < len(cheap) else [])
    cheap.extend(moved)
    return True

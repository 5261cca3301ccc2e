"""The order of samples: a pure function of (seed, epoch, size), the same at any number of ranks and workers.

Global batch number b of an epoch is positions ``[b * G, (b + 1) * G)`` of the epoch's order, G being the global batch
size; a rank takes its slice of those. What is left at the end, fewer than G samples, is dropped from that epoch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Request:
    """What one rank reads for one batch.

    Attributes:
        samples: Sample numbers.
        padding: How many of them, at the end, are repeats that only keep the ranks in step.
        cursor: In training, where the order stands after this batch: ``epoch`` and ``sample``, the global samples seen
            in it. Elsewhere ``sample``, the number of the batch's first sample.
    """

    samples: list[int]
    padding: int
    cursor: dict[str, int]


def permutation(seed: int, epoch: int, size: int, *more: int) -> np.ndarray:
    """The numbers below ``size``, shuffled by a generator keyed with (seed, epoch, size) and any ``more`` numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, size, *more]))).permutation(size)


def mixture(seed: int, epoch: int, groups: Sequence[Sequence[int]], weights: Sequence[float]) -> np.ndarray:
    """As many samples as the groups hold, drawn so that every group has its share at every moment.

    Each draw takes the group that is furthest behind its share (largest deficit first), and in it the next sample of
    the group's own shuffled order, shuffled anew whenever it runs out.

    Args:
        seed: Seed.
        epoch: Epoch.
        groups: Sample numbers of each group, none empty.
        weights: Share of each group, positive, in any unit.

    Returns:
        Sample numbers in order.
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    streams = [_endless(seed, epoch, number, group) for number, group in enumerate(groups)]
    drawn = np.zeros(len(groups))
    order = np.empty(sum(map(len, groups)), dtype=np.int64)
    for position in range(len(order)):
        behind = int(np.argmax(shares * (position + 1) - drawn))
        drawn[behind] += 1
        order[position] = next(streams[behind])
    return order


def _endless(seed: int, epoch: int, number: int, group: Sequence[int]) -> Iterator[int]:
    turn = 0
    while True:
        for at in permutation(seed, epoch, len(group), number, turn):
            yield group[at]
        turn += 1


def settled(cursor: Mapping[str, int], size: int, step: int) -> dict[str, int]:
    """The cursor or, when a run with smaller global batches left less than ``step`` samples, that of the next epoch."""
    return dict(cursor) if size - cursor["sample"] >= step else {"epoch": cursor["epoch"] + 1, "sample": 0}


def train_requests(
    order: Sequence[int] | np.ndarray, cursor: Mapping[str, int], batch_size: int, rank: int, world: int
) -> Iterator[Request]:
    """Batches of one rank from ``cursor`` to the end of its epoch.

    Args:
        order: Order of the cursor's epoch.
        cursor: ``epoch`` and ``sample``, settled.
        batch_size: Samples per rank.
        rank: Data-parallel rank.
        world: Number of data-parallel ranks.

    Yields:
        One request per global batch.
    """
    step = batch_size * world
    for start in range(cursor["sample"], len(order) - step + 1, step):
        mine = order[start + rank * batch_size : start + (rank + 1) * batch_size]
        last = start + 2 * step > len(order)
        after = {"epoch": cursor["epoch"] + last, "sample": 0 if last else start + step}
        yield Request([int(number) for number in mine], 0, after)


def eval_requests(size: int, batch_size: int, rank: int, world: int) -> list[Request]:
    """Every sample once, in order, in equally many batches of every rank.

    A rank for which nothing is left in the last global batch repeats the last sample as padding.
    """
    requests = []
    for start in range(0, size, batch_size * world):
        first = start + rank * batch_size
        real = max(0, min(batch_size, size - first))
        samples = range(first, first + real) or [size - 1]  # a rank with nothing left keeps step with the others
        requests.append(Request(list(samples), len(samples) - real, {"sample": first}))
    return requests

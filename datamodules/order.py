"""The order of samples: a pure function of (seed, epoch, fingerprint), the same at any number of ranks and workers.

A run trains on one endless row of samples, pass after pass. Global batch number b is its positions
``[b * G, (b + 1) * G)``, G being the global batch size; a rank takes its slice of those. A batch may span two passes,
so that no pass leaves a sample out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from datamodules.mixing import Mix

CACHED_WINDOWS = 2  # the one being read, and the next, into which a batch may reach


@dataclass(frozen=True)
class Request:
    """What one rank reads for one batch.

    Attributes:
        samples: Sample numbers.
        padding: How many of them, at the end, are repeats that only keep the ranks in step.
        cursor: In training, where the order stands after this batch: ``epoch`` and ``sample``, the global samples seen
            in it. Elsewhere ``sample``, the number of the batch's first sample.
        epochs: In training, the epoch of each sample: a batch may span two.
        place: As of `bernini.conversation.Batch`.
        weight: As of `bernini.conversation.Batch`.
    """

    samples: list[int]
    padding: int
    cursor: dict[str, int]
    epochs: Sequence[int] = ()
    place: int | None = None
    weight: float = 1.0


class Order(Protocol):
    """A row of sample numbers without an end."""

    def __getitem__(self, position: int) -> int:
        """The sample at a position."""


def permutation(seed: int, epoch: int, size: int, *more: int) -> np.ndarray:
    """The numbers below ``size``, shuffled by a generator keyed with (seed, epoch, size) and any ``more`` numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, size, *more]))).permutation(size)


class Shuffled:
    """Pass after pass over the samples of some shards, each pass in an order of its own.

    A pass permutes the shards, and then the samples of every ``window`` shards that follow each other: reading stays
    with a few shards at a time. Any position is found from the orders of the shards and of its window alone.

    Args:
        shards: Number of samples of each shard; samples are numbered through.
        window: Shards whose samples are shuffled together; as many as there are make it a shuffle of all.
        seed: Seed.
        key: Numbers that tell the data apart from others that are shuffled with this seed.
        first: Number of the first sample.

    Attributes:
        size: Samples of a pass.
    """

    def __init__(self, shards: Sequence[int], window: int, seed: int, key: Sequence[int] = (), first: int = 0) -> None:
        self.sizes, self.window, self.seed, self.key = np.asarray(shards, dtype=np.int64), window, seed, tuple(key)
        self.starts = first + np.cumsum(self.sizes) - self.sizes
        self.size = int(self.sizes.sum())
        self._shards = lru_cache(CACHED_WINDOWS)(self._permuted_shards)
        self._samples = lru_cache(CACHED_WINDOWS)(self._permuted_samples)

    def __getitem__(self, position: int) -> int:
        """The sample at a position, counted over all passes."""
        epoch, place = divmod(position, self.size)
        _, ends = self._shards(epoch)
        number = int(np.searchsorted(ends, place, side="right"))
        return int(self._samples(epoch, number)[place - (int(ends[number - 1]) if number else 0)])

    def _permuted_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of a pass in order, and the position at which each window ends."""
        shards = permutation(self.seed, epoch, len(self.sizes), *self.key)
        sizes = self.sizes[shards]
        return shards, np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), self.window)))

    def _permuted_samples(self, epoch: int, number: int) -> np.ndarray:
        """The samples of a window in order."""
        shards = self._shards(epoch)[0][number * self.window : (number + 1) * self.window]
        samples = np.concatenate([self.starts[shard] + np.arange(self.sizes[shard]) for shard in shards])
        return samples[permutation(self.seed, epoch, len(samples), *self.key, number)]


class Mixed:
    """Several orders in one, each in its share.

    Args:
        mix: Says whose turn it is.
        orders: Order of each source of the mix.
    """

    def __init__(self, mix: Mix, orders: Sequence[Order]) -> None:
        self.mix, self.orders = mix, orders

    def __getitem__(self, position: int) -> int:
        """The sample at a position."""
        source, place = self.mix.draw(position)
        return self.orders[source][place]


def train_requests(
    order: Order, cursor: Mapping[str, int], size: int, length: int, batch_size: int, rank: int, world: int
) -> Iterator[Request]:
    """Batches of one rank from ``cursor`` to the end of its epoch.

    Args:
        order: Order of the samples.
        cursor: ``epoch`` and ``sample``.
        size: Samples of an epoch, by which cursors count.
        length: Global batches of an epoch.
        batch_size: Samples per rank.
        rank: Data-parallel rank.
        world: Number of data-parallel ranks.

    Yields:
        One request per global batch.
    """
    step = batch_size * world
    start = cursor["epoch"] * size + cursor["sample"]
    for _ in range(length - start // step % length):
        mine = range(start + rank * batch_size, start + (rank + 1) * batch_size)
        start += step
        epoch, sample = divmod(start, size)
        cursor = {"epoch": epoch, "sample": sample}
        yield Request([order[position] for position in mine], 0, cursor, [position // size for position in mine])


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

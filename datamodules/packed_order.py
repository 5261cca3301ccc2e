"""The order of samples in packs: windows of it are packed one by one, each as a pure function of what is in it.

A window is a fixed number of positions of the order, some tens of steps long. Step number s of it is the same at any
number of ranks and workers; a rank takes its slice of the step's packs, as it does of a batch.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from bernini.errors import ConfigError
from datamodules.order import CACHED_WINDOWS, Order, Request
from datamodules.packing import CROSSOVER, Step, pack_window


@dataclass(frozen=True)
class PackConfig:
    """Batches of as many samples as fill a budget of tokens, a pack per rank.

    Attributes:
        tokens: Most tokens of a pack, those of the renderer.
        window: Steps, about, whose samples are packed together. More of them make packs fuller, and leave samples
            further from their place in the order.
        crossover: Length in tokens at which attention costs as much as all else, `3 d + f` of a model of width d and
            feed-forward width f: 29184 for the 14B shape, 13568 for 1.3B.

    Raises:
        ConfigError: A number is below 1.
    """

    tokens: int
    window: int = 64
    crossover: int = CROSSOVER

    def __post_init__(self) -> None:
        if min(self.tokens, self.window, self.crossover) < 1:
            raise ConfigError("tokens, window and crossover of packs are 1 or more", where="data.init_args.pack")


@dataclass(frozen=True)
class Window:
    """A window that has been packed.

    Attributes:
        samples: Sample at each place.
        steps: Its steps.
        used: Samples in the packs before each of its packs, and in all.
    """

    samples: list[int]
    steps: list[Step]
    used: list[int]


class Packed:
    """An order of samples in packs.

    Args:
        order: The order.
        size: Samples of an epoch, by which cursors count.
        tokens: Tokens of each sample by its number.
        mean: Tokens of a sample of the order, on average.
        config: Budget and window.
        packs: Packs of an optimizer step, on all ranks.
        seed: Seed of the order of steps in a window.

    Attributes:
        length: Samples of a window.
        steps: Optimizer steps of an epoch, about as many as its tokens fill.

    Raises:
        ConfigError: A sample has more tokens than the budget, or none, or an epoch has fewer than a step takes.
    """

    def __init__(
        self, order: Order, size: int, tokens: np.ndarray, mean: float, config: PackConfig, packs: int, seed: int
    ) -> None:
        self.order, self.size, self.tokens = order, size, tokens
        self.config, self.packs, self.seed = config, packs, seed
        if not 0 < tokens.min() <= tokens.max() <= config.tokens:
            raise ConfigError(
                f"samples have {tokens.min()} to {tokens.max()} tokens, a pack takes {config.tokens}",
                where="data.init_args.pack.tokens",
                why="a sample is never divided, and one that a planner alone can see has no tokens",
                fix="give packs more tokens, or bound the samples by max_frames, max_edge or max_area",
            )
        self.length = max(packs, round(config.window * packs * config.tokens / mean))
        self.steps = size * config.window // self.length
        if not self.steps:
            raise ConfigError(
                f"{size} training samples of {mean:.0f} tokens, but a step takes {packs} packs of {config.tokens}",
                where="data.init_args.pack.tokens",
                fix="use more samples or smaller packs",
            )
        self._window = lru_cache(CACHED_WINDOWS + 1)(self._packed)  # one more: that of the step that was done last

    @property
    def identity(self) -> list[int | str]:
        """What packs depend on beside the order: budget, samples of a window, packs of a step, and a hash of sizes."""
        sizes = hashlib.sha256(repr(self.config.crossover).encode() + self.tokens.tobytes()).hexdigest()[:16]
        return [self.config.tokens, self.length, self.packs, sizes]

    def requests(self, cursor: Mapping[str, int], length: int, rank: int, world: int) -> Iterator[Request]:
        """Packs of one rank from ``cursor`` to the end of its epoch as Lightning counts.

        Args:
            cursor: ``epoch`` and ``sample``, the samples seen in it; ``pack``, the packs seen of the window, and
                ``packs``, all that have been seen.
            length: Packs of an epoch on each rank.
            rank: Data-parallel rank.
            world: Number of data-parallel ranks.

        Yields:
            One request per global batch, of ``world`` packs.
        """
        number, pack, packs = self._window_at(cursor), cursor["pack"], cursor["packs"]
        for _ in range(length - packs // world % length):
            window, first = self._window(number), number * self.length
            step, place = divmod(pack, self.packs)
            mine = window.steps[step].packs[place + rank]
            used = window.used[pack - place : pack - place + self.packs + 1]  # of this step
            place_in_step = used[place + rank] - used[0]
            weight = (used[place + world] - used[place]) / (used[-1] - used[0]) * self.packs / world
            pack, packs = pack + world, packs + world
            seen = first + window.used[pack]
            if pack == len(window.steps) * self.packs:
                number, pack, seen = number + 1, 0, first + self.length
            epoch, sample = divmod(seen, self.size)
            after = {"epoch": epoch, "sample": sample, "pack": pack, "packs": packs}
            epochs = [(first + at) // self.size for at in mine]
            yield Request([window.samples[at] for at in mine], 0, after, epochs, place_in_step, weight)

    def measures(self, cursor: Mapping[str, int]) -> dict[str, float]:
        """Of the optimizer step before ``cursor`` its tokens, what of the budget they leave, and how far costs differ.

        The spread is that of the cheapest pack below the dearest: the part of a step for which a rank waits at most.
        """
        number, pack = self._window_at(cursor), cursor["pack"]
        steps = self._window(number if pack else number - 1).steps
        step = steps[pack // self.packs - 1]
        return {
            "data/tokens": float(sum(step.tokens)),
            "data/padding": 1 - sum(step.tokens) / (self.packs * self.config.tokens),
            "data/cost_spread": 1 - min(step.costs) / max(step.costs),
        }

    def _window_at(self, cursor: Mapping[str, int]) -> int:
        return (cursor["epoch"] * self.size + cursor["sample"]) // self.length

    def _packed(self, number: int) -> Window:
        samples = [self.order[position] for position in range(number * self.length, (number + 1) * self.length)]
        sizes = self.tokens[samples].tolist()
        steps = pack_window(sizes, self.config.tokens, self.packs, (self.seed, number), self.config.crossover)
        used = accumulate((len(pack) for step in steps for pack in step.packs), initial=0)
        return Window(samples, steps, list(used))

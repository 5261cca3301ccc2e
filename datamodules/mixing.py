"""Several sources in one order: at every position it is known whose turn it is, without a draw and without a state.

Between two sources the turn goes to the one that is further behind its share (largest deficit first), which has a
closed form: after n turns the first has had its share of n, rounded. More sources are halved again and again into two
sides that take turns in this way. Any position is found in as many steps as the sources can be halved, be it the first
or the billionth, and every rounding leaves a source within half a sample more of its share.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import floor, fsum, isfinite, sqrt

from bernini.errors import ConfigError

Weight = float | Mapping[int, float]


@dataclass(frozen=True)
class SourceConfig:
    """Shards to train on, and how much of training they are.

    Attributes:
        shards: Folder, or folders, of shards.
        weight: Share of the training samples, in any unit. Weights that change are given by sample number, counted
            over the whole run: ``{0: 11, 500000: 0}`` goes to 0 in a straight line.
        tasks: Tasks to keep; null keeps those of the data module.
    """

    shards: str | list[str]
    weight: float | dict[int, float] = 1.0
    tasks: list[str] | None = None


class Mix:
    """Whose turn it is, for any number of samples.

    At every sample number that a weight names, a source's share is its weight over the sum of weights; between these
    numbers shares go in straight lines, and after the last one they stay.

    Args:
        weights: Weight of each source by its name: a number, or numbers by sample number, as in `SourceConfig`.

    Attributes:
        names: Names of the sources.
        table: Sample numbers at which shares are given, and the share of every source there.

    Raises:
        ConfigError: A weight is negative or nowhere above 0, or at some sample number all are 0.
    """

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self.names = list(weights)
        given = {name: dict(w) if isinstance(w, Mapping) else {0: w} for name, w in weights.items()}
        for name, schedule in given.items():
            good = all(at >= 0 and isfinite(weight) and weight >= 0 for at, weight in schedule.items())
            if not good or not any(schedule.values()):
                raise ConfigError(
                    f"the weight of {name} is {weights[name]}",
                    where=f"data.init_args.train.{name}.weight",
                    why="weights and sample numbers are at least 0, and a weight is somewhere above 0",
                    fix="give another weight, or leave the source out",
                )
        knots = sorted({0}.union(*given.values()))
        shares: list[list[float]] = []
        for at in knots:
            row = [_between(schedule, at) for schedule in given.values()]
            if not any(row):
                raise ConfigError(f"all weights are 0 at sample {at}", where="data.init_args.train")
            shares.append([weight / fsum(row) for weight in row])  # fsum: the same sum in every version of Python
        self.table = list(zip(knots, shares, strict=True))
        self._root = _Side(knots, shares, range(len(given)))

    def draw(self, number: int) -> tuple[int, int]:
        """The source of sample ``number`` of a run, and how many samples came from that source before."""
        side = self._root
        while side.halves:
            before = side.first_half(number)
            if side.first_half(number + 1) > before:
                side, number = side.halves[0], before
            else:
                side, number = side.halves[1], number - before
        return side.sources[0], number

    def counts(self, number: int) -> list[int]:
        """How many of the first ``number`` samples each source gave.

        With up to 2^k sources each count is within k / 2 of what was asked for: 1 of four sources, 2 of sixteen.
        """
        return self._root.counts(number)

    def asked(self, number: int) -> list[float]:
        """How many of the first ``number`` samples each source should have given: the integral of its share."""
        return self._root.asked(number)


def _between(schedule: Mapping[int, float], at: int) -> float:
    """A weight at a sample number."""
    numbers = sorted(schedule)
    place = bisect_right(numbers, at)
    if place in (0, len(numbers)):
        return schedule[numbers[max(place - 1, 0)]]
    first, last = numbers[place - 1], numbers[place]
    return schedule[first] + (schedule[last] - schedule[first]) * (at - first) / (last - first)


class _Side:
    """Sources that take turns: what is theirs together, and the two halves of them.

    Args:
        knots: Sample numbers, the first is 0.
        shares: Share of every source at each of them.
        sources: Which sources these are.
    """

    def __init__(self, knots: Sequence[int], shares: Sequence[Sequence[float]], sources: range) -> None:
        self.sources, self.knots = sources, knots
        self.shares = [fsum(row[source] for source in sources) for row in shares]
        spans = [last - first for first, last in pairwise(knots)]
        areas = [span * (a + b) / 2 for span, (a, b) in zip(spans, pairwise(self.shares), strict=True)]
        self.areas = list(accumulate(areas, initial=0.0))
        self.slopes = [(b - a) / span for span, (a, b) in zip(spans, pairwise(self.shares), strict=True)] + [0.0]
        middle = len(sources) // 2
        halves = (sources[:middle], sources[middle:]) if middle else ()
        self.halves = [_Side(knots, shares, half) for half in halves]

    def first_half(self, number: int) -> int:
        """How many of these sources' first ``number`` samples come from the first half of them."""
        return floor(self.halves[0]._area(self._end(number)) + 0.5)

    def counts(self, number: int) -> list[int]:
        if not self.halves:
            return [number]
        first = self.first_half(number)
        return self.halves[0].counts(first) + self.halves[1].counts(number - first)

    def asked(self, end: float) -> list[float]:
        return [area for half in self.halves for area in half.asked(end)] or [self._area(end)]

    def _area(self, end: float) -> float:
        """Samples that are theirs of the first ``end``."""
        line = bisect_right(self.knots, end) - 1
        run = end - self.knots[line]
        return self.areas[line] + run * (self.shares[line] + self.slopes[line] * run / 2)

    def _end(self, area: float) -> float:
        """The other way round: of how many samples ``area`` are theirs."""
        line = max(bisect_left(self.areas, area) - 1, 0)
        rest, share = area - self.areas[line], self.shares[line]
        twice = share + sqrt(max(share * share + 2 * self.slopes[line] * rest, 0.0))
        if not twice:  # their share has gone to 0; a last half sample is rounded up
            return self.knots[line]
        end = self.knots[line] + 2 * rest / twice
        return min(end, self.knots[line + 1]) if line + 1 < len(self.knots) else end

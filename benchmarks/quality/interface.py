"""What a benchmark is: its items, what is asked for each, how an output is scored, and how scores become a table."""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from benchmarks.quality.bootstrap import estimate, mean_of
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals.records import SHARE, Range
from bernini.conversation import Conversation

Z = 1.959964  # two-sided 95 %


@dataclass(frozen=True)
class Expectation:
    """What an output has to be: a file that differs is made again.

    Attributes:
        frames: Frames; 1 for an image.
        height: In pixels.
        width: In pixels.
        fps: Frames per second; 0 for an image.
    """

    frames: int
    height: int
    width: int
    fps: float = 0.0


@dataclass(frozen=True)
class Item:
    """One thing to be made and scored, without its pixels.

    Attributes:
        id: Unique within the benchmark.
        task: Name in the task table.
        prompt: What is asked for.
        expect: What the output has to be.
        metrics: Names of the scores that it gets; what is missing lowers the coverage.
        category: Finer than the task, e.g. the kind of edit; may be empty.
        repeat: Which of several outputs for one prompt.
        extra: What scoring needs besides the output, plain JSON.
    """

    id: str
    task: str
    prompt: str
    expect: Expectation
    metrics: tuple[str, ...]
    category: str = ""
    repeat: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def seed(self, base: int) -> int:
        """Seed of its noise: the same on any number of machines, in any batch."""
        digest = hashlib.blake2b(f"{base} {self.id} {self.repeat}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


class Cell(NamedTuple):
    """One figure of the table.

    Attributes:
        task: What it is taken over.
        metric: Name of the score.
        value: Mean over the scored items, in the score's own range; none without any.
        low: Lower end of the 95 % interval; none where nothing is known of it.
        high: Upper end.
        n: Items that were scored.
        of: Items that should have been.
    """

    task: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    of: int


@dataclass(frozen=True)
class Benchmark(ABC):
    """A benchmark; subclasses are frozen dataclasses, too, whose fields are the settings that decide its items.

    A benchmark is sent to scoring processes, so it holds settings only; weights and data are read when they are needed.

    Attributes:
        name: Name on the command line.
        version: Changes whenever the same settings give other items or scores.
        metrics: What each score says, by its name, in the order of the table.
        ranges: What each score may be, where that is not [0, 1].
        notes: Where it comes from, its licence, and what its figures may be compared with.
        places: Settings that say where its data lie and on what terms, which change no item.
        lower_is_better: Scores that are better the lower they are.
        blank_targets: Whether the targets of its conversations are black and only say what size is wanted; then
            ``info["blank_target"]`` is true, and they are no reference.
        defaults: Its own defaults of `bernini bench`'s options of model and sampling, by option; ``guidance`` holds
            those of ``--mode`` and ``--omega``, without and with a plan.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    metrics: ClassVar[Mapping[str, str]]
    ranges: ClassVar[Mapping[str, Range]] = {}
    lower_is_better: ClassVar[Collection[str]] = ()
    notes: ClassVar[str]
    places: ClassVar[tuple[str, ...]] = ()
    blank_targets: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {}

    def settings(self) -> dict[str, Any]:
        """The settings that decide items and scores, plain JSON; the constructor takes them back."""
        return {name: value for name, value in self._plain().items() if name not in self.places}

    def located(self) -> dict[str, Any]:
        """The other settings, `places`, plain JSON."""
        return {name: value for name, value in self._plain().items() if name in self.places}

    @abstractmethod
    def items(self) -> Sequence[Item]:
        """All items, always in the same order."""

    @abstractmethod
    def conversation(self, item: Item) -> Conversation:
        """The item with the pixels of its sources and, where it is known, of its target."""

    def source_files(self, item: Item) -> Mapping[str, Path]:
        """Files of the download that an item is made from and scored against, by their names there."""
        return {}

    @abstractmethod
    def score(self, item: Item, pixels: Tensor) -> Mapping[str, float | None]:
        """Scores of an output ``[3, T, H, W]`` uint8, at least those of ``item.metrics`` that are `measured`.

        One that by its definition does not exist for the item is none.
        """

    def measured(self) -> tuple[str, ...]:
        """Names of the scores that `score` gives: here all."""
        return tuple(self.metrics)

    def wants(self, metric: str) -> tuple[str, ...]:
        """What a score that is not `measured` takes, in words."""
        return ()

    def output_path(self, item: Item) -> str:
        """File of the output under ``videos/``."""
        return f"{item.task}/{item.id}.{'mp4' if item.expect.frames > 1 else 'png'}"

    def aggregate(self, items: Sequence[Item], values: Mapping[tuple[str, str], float]) -> list[Cell]:
        """The table: here the plain mean of each score over the items of each task.

        Args:
            items: What was to be scored.
            values: Score by item id and name; their order does not matter.
        """
        cells = []
        for task in dict.fromkeys(item.task for item in items):
            for metric in self.metrics:
                asked = [item.id for item in items if item.task == task and metric in item.metrics]
                found = [values[one, metric] for one in asked if (one, metric) in values]
                if asked:
                    cells.append(cell(task, metric, found, len(asked), self.ranges.get(metric, SHARE)))
        return cells

    def tallies(self, items: Sequence[Item]) -> Sequence[Tally]:
        """Official figures of the items, if there are such."""
        return ()

    def _plain(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


def cell(task: str, metric: str, found: Sequence[float], of: int, allowed: Range = SHARE) -> Cell:
    """Mean and 95 % interval of scores, one an item.

    Args:
        task: What it is taken over.
        metric: Name of the score.
        found: The scores that are there.
        of: How many there should be.
        allowed: What a score may be. The interval is Wilson's where that is [0, 1], else the bootstrap's over items.
    """
    if not found:
        low, high = (end if math.isfinite(end) else None for end in (allowed.low, allowed.high))
        return Cell(task, metric, None, low, high, 0, of)
    mean = math.fsum(found) / len(found)
    if math.isinf(mean):  # the PSNR of equal frames
        return Cell(task, metric, mean, mean, mean, len(found), of)
    if is_share(allowed):
        return Cell(task, metric, mean, *interval(mean, len(found)), len(found), of)
    return Cell(task, metric, mean, *estimate([mean_of(np.array(found))], len(found)).bounds, len(found), of)


def is_share(allowed: Range) -> bool:
    """Whether scores of a range are shares, which are printed in per cent."""
    return (allowed.low, allowed.high) == (0, 1)


def interval(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a mean of ``n`` scores in [0, 1].

    It is made for shares of whole items, where unlike the bootstrap it is right near 0 and 1. The variance of any other
    scores in [0, 1] is at most that of a share with their mean, so for them it is on the safe side.
    """
    middle, spread = mean + Z**2 / (2 * n), Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    return max(0.0, (middle - spread) / (1 + Z**2 / n)), min(1.0, (middle + spread) / (1 + Z**2 / n))


def coverage(cells: Sequence[Cell]) -> float:
    """Share of the scores that were asked for and are there."""
    asked = sum(c.of for c in cells)
    return sum(c.n for c in cells) / asked if asked else 1.0


def asked(items: Sequence[Item], scores: Collection[str]) -> list[Item]:
    """The items, asked for some scores alone."""
    return [replace(item, metrics=tuple(name for name in item.metrics if name in scores)) for item in items]


def without(items: Sequence[Item], void: Collection[tuple[str, str]]) -> list[Item]:
    """The items, less scores that do not exist for them, by id and name."""
    return [replace(item, metrics=tuple(n for n in item.metrics if (item.id, n) not in void)) for item in items]


def is_comparable(cells: Sequence[Cell], items: Sequence[Item], of: int) -> bool:
    """Whether the figures may stand beside others: every item of the benchmark has every score."""
    given = Counter(cell.metric for cell in cells for _ in range(cell.n))
    return len(items) == of and given == Counter(name for item in items for name in item.metrics)


def subset(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most ``limit`` items, as evenly over the tasks as can be; which ones depends on their ids alone."""
    if limit is None or limit >= len(items):
        return list(items)
    by_task: dict[str, list[str]] = {}
    for item in sorted(items, key=lambda item: hashlib.sha256(item.id.encode()).digest()):
        by_task.setdefault(item.task, []).append(item.id)
    turns = [(turn, task, one) for task, ids in by_task.items() for turn, one in enumerate(ids)]
    chosen = {one for _, _, one in sorted(turns)[:limit]}
    return [item for item in items if item.id in chosen]

"""`bernini data stats`: how many, how long and how large the samples of each task are."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any

from bernini.errors import DataError
from datamodules.tools.folder import Folder, Record, aligned

ASPECTS = {f"{w}:{h}": w / h for w, h in ((9, 21), (1, 2), (9, 16), (2, 3), (3, 4), (1, 1))}
ASPECTS |= {":".join(reversed(name.split(":"))): 1 / ratio for name, ratio in reversed(ASPECTS.items())}
BAR = 30  # characters of the longest bar


@dataclass
class Stats:
    """Figures of one task in one folder. Sizes, frames and seconds are of targets, or of sources where there are none.

    Attributes:
        folder: The folder.
        task: The task.
        samples: Number of samples.
        bytes: What they take in their shards.
        seconds: Length of all clips together.
        frames: Frames of a visual -> number of visuals.
        fps: Frames per second of a clip -> number of clips.
        sizes: Width and height in pixels -> number of visuals.
        words: Words of a prompt -> number of samples.
        sources: Source images and clips of a sample -> number of samples.
    """

    folder: str
    task: str
    samples: int = 0
    bytes: int = 0
    seconds: float = 0.0
    frames: Counter[int] = field(default_factory=Counter)
    fps: Counter[float] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    sources: Counter[int] = field(default_factory=Counter)

    def add(self, record: Record, size: int) -> None:
        """Count one more sample, of so many bytes."""
        self.samples += 1
        self.bytes += size
        self.words[len(record.conversation.prompt.split())] += 1
        targets = [visual for visual in record.visuals if visual.message.is_target]
        self.sources[len(record.visuals) - len(targets)] += 1
        for visual in targets or record.visuals:
            self.frames[visual.frames] += 1
            self.sizes[visual.width, visual.height] += 1
            if visual.fps:
                self.fps[round(visual.fps, 3)] += 1
                self.seconds += visual.frames / visual.fps

    @property
    def aspects(self) -> Counter[str]:
        """Aspect ratio, the nearest of `ASPECTS` -> number of visuals."""
        counts: Counter[str] = Counter()
        for (width, height), count in self.sizes.items():
            counts[aspect(width, height)] += count
        return counts

    @property
    def common_size(self) -> tuple[int, int, float]:
        """Width and height that most visuals have, and the share of these."""
        (width, height), count = (*self.sizes.most_common(1), ((0, 0), 0))[0]
        return width, height, count / max(1, self.sizes.total())

    def row(self) -> dict[str, Any]:
        """All of it as plain JSON, values in order."""
        counts = {name: dict(sorted(getattr(self, name).items())) for name in ("frames", "fps", "words", "sources")}
        sizes = {f"{width}x{height}": count for (width, height), count in self.sizes.most_common()}
        aspects = {name: self.aspects[name] for name in ASPECTS if name in self.aspects}
        head = {"folder": self.folder, "task": self.task, "samples": self.samples, "bytes": self.bytes}
        return {**head, "seconds": round(self.seconds, 3), **counts, "sizes": sizes, "aspects": aspects}


def aspect(width: int, height: int) -> str:
    """Name of the nearest ratio of `ASPECTS`, by its logarithm."""
    return min(ASPECTS, key=lambda name: abs(math.log(ASPECTS[name] * height / width)))


def measure(folders: Iterable[Folder]) -> list[Stats]:
    """Figures of each task of each folder; rows, image files and the heads of features are read for them.

    Raises:
        BadSample: A sample is damaged.
        DataError: A sample was not written by `bernini prepare`.
        ServiceError: The service does not give it.
    """
    found: dict[tuple[str, str], Stats] = {}
    for folder in folders:
        for entry in folder.entries:
            if not entry.task:
                where, why = f"{folder.store.where(entry.shard)}:{entry.key}", "it was not written by `bernini prepare`"
                raise DataError("the sample has no row", where=where, why=why, fix="`bernini data info` counts it")
            stats = found.setdefault((folder.name, entry.task), Stats(folder.name, entry.task))
            stats.add(folder.record(entry), entry.span)
    return list(found.values())


def lines(found: Sequence[Stats]) -> Iterator[str]:
    """A table, and a histogram of aspect ratios, for the terminal."""
    several = len({stats.folder for stats in found}) > 1
    rows = [_flat(stats) for stats in found]
    shown = [name for name in rows[0] if several or name != "folder"]
    yield from aligned(shown, [[row[name] for name in shown] for row in rows], left=2 if several else 1)
    yield ""
    total: Counter[str] = Counter()
    sizes: dict[str, Counter[tuple[int, int]]] = {}
    for stats in found:
        total.update(stats.aspects)
        for size, count in stats.sizes.items():
            sizes.setdefault(aspect(*size), Counter())[size] += count
    for name in (name for name in ASPECTS if name in total):
        bar = "█" * max(1, round(BAR * total[name] / max(total.values())))
        common = [f"{width}x{height}" for (width, height), _ in sizes[name].most_common(3)]
        more = f" and {len(sizes[name]) - 3} more" if len(sizes[name]) > 3 else ""
        yield f"{name:>5}{total[name]:>8}  {bar}  {', '.join(common)}{more}"


def as_json(found: Sequence[Stats]) -> str:
    """Everything that was counted."""
    return json.dumps([stats.row() for stats in found], indent=2)


def as_csv(found: Sequence[Stats]) -> str:
    """The table, with least, median and greatest values in columns of their own."""
    file = io.StringIO()
    rows = [_plain(stats) for stats in found]
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().rstrip("\n")


def _plain(stats: Stats) -> dict[str, Any]:
    row: dict[str, Any] = {"folder": stats.folder, "task": stats.task, "samples": stats.samples, "bytes": stats.bytes}
    row["seconds"] = round(stats.seconds, 3)
    row["width"], row["height"], _ = stats.common_size
    for name in ("frames", "fps", "words", "sources"):
        low, middle, high = _spread(getattr(stats, name))
        row |= {f"{name}_min": low, f"{name}_median": middle, f"{name}_max": high}
    return row


def _flat(stats: Stats) -> dict[str, str]:
    """The table's row: a range with its median where the values are not all the same."""
    row = {"folder": stats.folder, "task": stats.task, "samples": str(stats.samples), "seconds": f"{stats.seconds:.1f}"}
    for name in ("frames", "fps", "words", "sources"):
        low, middle, high = _spread(getattr(stats, name))
        row[name] = "-" if low is None else f"{low:g}" if low == high else f"{low:g}..{middle:g}..{high:g}"
    width, height, share = stats.common_size
    row["size"] = f"{width}x{height} {share:.0%}" if share else "-"
    row["MB"] = f"{stats.bytes / 1e6:.1f}"
    return row


def _spread(counts: Counter[Any]) -> tuple[Any, Any, Any]:
    """Least, median and greatest value; nothing without values."""
    values = list(counts.elements())
    return (min(values), median_low(values), max(values)) if values else (None, None, None)

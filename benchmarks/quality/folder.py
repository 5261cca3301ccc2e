"""The folder of a benchmark run: manifest, outputs, and what each stage says about each item.

``items.jsonl``, ``manifest.json``, ``videos/``, ``gen.jsonl``, ``scores/<metric>.jsonl``, ``summary.json``,
``table.md``, ``table.csv``; where a judge was asked, ``judge/settings.json`` and ``judge/answers.jsonl``; where models
measured, ``models.json``.
Parts that several processes make side by side keep lists of their own, ``gen.0of4.jsonl``, and are read as one.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from benchmarks.quality.interface import Benchmark, Item
from bernini.errors import ConfigError, DataError
from bernini.files import replacing
from bernini.media import read_image, read_video

Row = dict[str, Any]
ITEMS, MANIFEST, SUMMARY, MODELS = "items.jsonl", "manifest.json", "summary.json", "models.json"
JUDGE, ANSWERS = "judge/settings.json", "judge/answers.jsonl"
FIGURES = ("value", "low", "high")  # of scores, cells and totals


@dataclass(frozen=True)
class Shard:
    """A part of the items: those whose number leaves the remainder ``index`` when divided by ``count``."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(f"there is no shard {self.index} of {self.count}", why="shards count from 0", fix="0/2")

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Its items."""
        return items[self.index :: self.count]


class Journal:
    """Rows about items, as JSON lines that a process only ever appends to.

    Args:
        path: File; shards write beside it.
        shard: Which part this process writes.
    """

    def __init__(self, path: Path, shard: Shard) -> None:
        self.path, self.shard = path, shard

    @property
    def file(self) -> Path:
        """The file that this process appends to."""
        part = "" if self.shard.count == 1 else f".{self.shard.index}of{self.shard.count}"
        return self.path.with_name(f"{self.path.stem}{part}.jsonl")

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows, on the disk when this returns; what a crash left of an unfinished row goes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as file:
            _drop_unfinished(file)
            file.write("".join(dumps(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> dict[str, Row]:
        """The last row of each item over all shards; a failure counts only where no row tells of success."""
        found: dict[str, Row] = {}
        for row in self._lines():
            if row["id"] not in found or "failed" in found[row["id"]] or "failed" not in row:
                found[row["id"]] = row
        return found

    def _lines(self) -> Iterator[Row]:
        folder, stem = self.path.parent, self.path.stem
        for file in [self.path, *sorted(folder.glob(f"{stem}.*of*.jsonl"))] if folder.is_dir() else []:
            for number, line in enumerate(file.read_bytes().split(b"\n")[:-1] if file.is_file() else [], 1):
                try:
                    yield loads(line)
                except ValueError as error:
                    raise DataError(
                        "a line is not JSON", where=f"{file}, line {number}", why=str(error), fix="delete the line"
                    ) from error


class RunFolder:
    """One run of one benchmark over one model.

    Args:
        root: The folder.
        shard: Which part of the items this process works on.
    """

    def __init__(self, root: str | Path, shard: Shard = Shard()) -> None:
        self.root, self.shard = Path(root), shard

    @property
    def generated(self) -> Journal:
        """What became of each item: its file and seed, or why there is none."""
        return Journal(self.root / "gen.jsonl", self.shard)

    def scores(self, metric: str) -> Journal:
        """Values of one score."""
        return Journal(self.root / "scores" / f"{metric}.jsonl", self.shard)

    def values(self, metrics: Sequence[str] | Mapping[str, str]) -> dict[tuple[str, str], float]:
        """All scores by item id and name."""
        return {key: value for key, value in self._told(metrics).items() if value is not None}

    def void(self, metrics: Sequence[str]) -> set[tuple[str, str]]:
        """Items and scores that by the score's definition do not exist for the item, such as of an empty mask."""
        return {key for key, value in self._told(metrics).items() if value is None}

    def _told(self, metrics: Sequence[str] | Mapping[str, str]) -> dict[tuple[str, str], float | None]:
        rows = ((metric, row) for metric in metrics for row in self.scores(metric).rows().values())
        return {(row["id"], metric): row["value"] for metric, row in rows if "value" in row}

    def scored(self, benchmark: Benchmark) -> tuple[str, ...]:
        """Names of the scores that this run gives: of pixels, of models that measured, of a judge that was asked."""
        judge = self.judge()
        return (*benchmark.measured(), *self.models(), *(judge["scores"] if judge else ()))

    def output(self, benchmark: Benchmark, item: Item) -> Path:
        """Where the output of an item lies."""
        return self.root / "videos" / benchmark.output_path(item)

    def start(
        self, identity: Mapping[str, Any], environment: Mapping[str, str], located: Mapping[str, Any] = {}
    ) -> None:
        """Write the manifest, or see that the one that is there says the same.

        Args:
            identity: Everything that decides the outputs: benchmark, items, weights, settings.
            environment: Facts of the machine and the packages, which are noted and not compared.
            located: Where the benchmark's data lie, see `Benchmark.located`; the last word counts.

        Raises:
            ConfigError: The folder holds something else, or a run with other weights or settings.
        """
        identity = json.loads(json.dumps(identity))
        path = self.root / MANIFEST
        if path.is_file():
            if differ := sorted(_differences(self.manifest()["run"], identity)):
                raise ConfigError(
                    f"the folder holds another run: {differ[0]}"
                    + (f" (and {len(differ) - 1} more)" * (len(differ) > 1)),
                    where=str(path),
                    why="outputs of two models or two settings would end in one table",
                    fix="use another --out, or delete the folder",
                )
            if self.manifest()["located"] != located:
                self._write_manifest({**self.manifest(), "located": dict(located)})
            return
        there = {file.name for file in self.root.glob("[!.]*")} if self.root.exists() else set()
        if there - {ITEMS, MANIFEST}:
            raise ConfigError(f"{self.root} is not empty", why="it is not a benchmark's folder", fix="another --out")
        told = {"config_sha256": digest(identity), "run": identity, "located": dict(located)}
        self._write_manifest({**told, "environment": dict(environment)})

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        with replacing(self.root / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2) + "\n")

    def manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            ConfigError: The folder holds no run.
        """
        # Folders that were made before benchmarks had data elsewhere do not tell where they lie.
        return {"located": {}, **self._read(MANIFEST, "`bernini bench generate` starts one", ("run", "environment"))}

    def judge(self) -> dict[str, Any] | None:
        """Who judged the outputs: ``column``, ``scores`` and ``settings``; none if nobody did."""
        if not (self.root / JUDGE).is_file():
            return None
        return self._read(JUDGE, "", ("column", "scores", "settings"))

    def models(self) -> dict[str, Any]:
        """Which weights each score was measured with, that takes some."""
        return self._read(MODELS, "", ()) if (self.root / MODELS).is_file() else {}

    def summary(self) -> dict[str, Any]:
        """The summary.

        Raises:
            ConfigError: Nothing was aggregated yet.
        """
        return self._read(SUMMARY, f"bernini bench aggregate {self.root}", ("cells", "run"))

    def _read(self, name: str, fix: str, keys: Sequence[str]) -> dict[str, Any]:
        path = self.root / name
        if not path.is_file():
            raise ConfigError(f"no {name} in {self.root}", where=str(path), why="the file does not exist", fix=fix)
        try:
            told: dict[str, Any] = loads(path.read_bytes())
            if lacking := [key for key in keys if key not in told]:
                raise ValueError(f"there is no {lacking[0]!r}")
        except (ValueError, TypeError) as error:
            raise DataError(f"{name} is damaged", where=str(path), why=str(error), fix=fix) from error
        return told


def _drop_unfinished(file: BinaryIO) -> None:
    """Cut a file off after its last newline."""
    if not file.seek(0, os.SEEK_END):
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def dumps(value: Any, indent: int | None = None) -> str:
    """Strict JSON, where infinite figures, such as the PSNR of equal frames, are the strings ``inf`` and ``-inf``."""
    return json.dumps(_strict(value), indent=indent, allow_nan=False)


def loads(text: bytes) -> Any:
    """What `dumps` wrote."""
    return json.loads(text, object_hook=_figures)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(one) for one in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _figures(row: Row) -> Row:
    return {key: float(one) if key in FIGURES and one in ("inf", "-inf") else one for key, one in row.items()}


def digest(value: Any) -> str:
    """SHA-256 of plain JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def describe(benchmark: Benchmark, items: Sequence[Item], of: int) -> dict[str, Any]:
    """What a manifest says of a benchmark and its items: how many of how many, and a hash of what is asked."""
    about = {"name": benchmark.name, "version": benchmark.version, "settings": benchmark.settings()}
    asked = {"count": len(items), "of": of, "sha256": digest([asdict(item) for item in items])}
    return {"benchmark": about, "items": asked}


def _differences(a: Any, b: Any, key: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in a.keys() | b.keys():
            yield from _differences(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield f"{key} is {a} there and {b} here"


def read_output(path: Path, item: Item) -> Tensor:
    """Decode an output.

    Returns:
        ``[3, T, H, W]`` uint8.

    Raises:
        DataError: The file is missing or damaged, or is not what the item expects.
    """
    expect = item.expect
    media = read_video(path) if path.suffix == ".mp4" else read_image(path)
    assert media.pixels is not None
    pixels = media.pixels[:, : int(media.source["sampled"])]
    found, wanted = (*pixels.shape[1:], round(media.fps, 3)), (expect.frames, expect.height, expect.width, expect.fps)
    if found != (*wanted[:3], round(expect.fps, 3)):
        raise DataError(
            f"an output is {found}, expected {wanted}", where=str(path), why="these are frames, height, width and fps"
        )
    return pixels


def reason(error: Exception) -> str:
    """An error as a row tells it, in one line."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return f"{type(error).__name__}: {text}"[:500]

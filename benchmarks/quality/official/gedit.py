"""GEdit-Bench: edits of images that users asked for, in English and Chinese."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from benchmarks.quality.interface import Expectation, Item
from benchmarks.quality.official.base import Sourced, facts
from benchmarks.quality.official.drafts import Draft, word
from benchmarks.quality.official.needs import Judge, Needs
from benchmarks.quality.official.reading import Row, Schema, checked, refuse
from benchmarks.quality.official.settings import check_choice
from benchmarks.quality.official.sizing import picture_like
from benchmarks.quality.official.source import Source
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import gedit
from benchmarks.quality.totals.gedit import GROUPS
from benchmarks.quality.totals.records import Range
from bernini.errors import ConfigError, DataError
from bernini.media import read_image

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

Language = Literal["en", "cn", "all"]
FIELDS = ("key", "task_type", "instruction", "instruction_language", "Intersection_exist")
IMAGE = "input_image_raw"
SCHEMA = Schema(
    required={
        "key": str,
        "task_type": str,
        "instruction": str,
        "instruction_language": str,
        "Intersection_exist": object,
    },
    optional={},
)


@dataclass(frozen=True)
class GEdit(Sourced):
    """GEdit-Bench, one image a row.

    Images stay in the parquet files: ``extra`` has ``parquet`` and ``row`` of the source, and ``intersection``, whether
    the item is in the set that all published models answered.

    Attributes:
        root: Folder of the download, with parquet files in it or in ``data/``.
        language: ``en``, ``cn`` or ``all``.
    """

    name: ClassVar[str] = "gedit"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = "GEdit-Bench, edits of eleven groups in two languages; Apache-2.0."
    source: ClassVar[Source] = Source(
        home="https://github.com/stepfun-ai/Step1X-Edit",
        download="hf download --repo-type dataset stepfun-ai/GEdit-Bench",
        licence="Apache-2.0",
    )
    metrics: ClassVar[dict[str, str]] = {
        "success": "the edit is what was asked for, 0 to 10",
        "over_editing": "what was not asked for stays, 0 to 10",
        "naturalness": "the image looks natural, 0 to 10",
        "artefacts": "it has no artefacts, 0 to 10",
    }
    ranges: ClassVar[dict[str, Range]] = dict.fromkeys(metrics, Range(0, 10))
    needs: ClassVar[Needs] = dict.fromkeys(metrics, (Judge("gpt-4.1-2025-04-14", answers=2),))

    root: str = "data/GEdit-Bench"
    language: Language = "en"
    max_edge: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("language", self.language, get_args(Language))

    def read(self) -> Iterator[Draft]:
        """One item a row of the chosen language, file by file."""
        for path in self._files():
            for number, row in enumerate(checked(_rows(path, self.source), SCHEMA, path, self.source)):
                group, language = row["task_type"], row["instruction_language"]
                for field, known in (("task_type", GROUPS), ("instruction_language", get_args(Language)[:2])):
                    if row[field] not in known:
                        what, why = f"unknown {field} {row[field]!r}", f"there are {', '.join(known)}"
                        raise refuse(what, path, number, field, why, self.source)
                if self.language in (language, "all"):
                    yield Draft(
                        id=f"{language}-{word(row['key'])}",
                        task="i2i",
                        prompt=row["instruction"],
                        output=f"fullset/{group}/{language}/{row['key']}.png",
                        metrics=tuple(self.metrics),
                        category=group,
                        extra={
                            "parquet": str(path.relative_to(self.folder)),
                            "row": number,
                            "intersection": bool(row["Intersection_exist"]),
                        },
                    )

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """The three figures and their groups, each language by itself."""
        languages = dict.fromkeys(item.id.partition("-")[0] for item in items)
        own = {one: [item for item in items if item.id.startswith(f"{one}-")] for one in languages}
        return [Tally(f"GEdit-Bench, {one}", facts(some), gedit.totals) for one, some in own.items()]

    def followed(self, draft: Draft) -> str:
        """File and row of the source."""
        return f"{draft.extra['parquet']}:{draft.extra['row']}"

    def expect(self, task: str, followed: str | None) -> Expectation:
        """An image as large as the source, within the limits."""
        file, _, row = str(followed).rpartition(":")
        return picture_like(self._image(file, int(row)), f"{self.folder / file}, entry {row}", self.sizes())

    def sources(self, item: Item) -> tuple[list[Path], list[Any]]:
        """The source, decoded."""
        file, row = item.extra["parquet"], item.extra["row"]
        return [], [read_image(self._image(file, row), where=f"{self.folder / file}, entry {row}").pixels]

    def source_files(self, item: Item) -> dict[str, Path]:
        """The parquet file that holds the source."""
        return {item.extra["parquet"]: self.folder / item.extra["parquet"]}

    def _files(self) -> list[Path]:
        found = sorted({*self.folder.glob("*.parquet"), *self.folder.glob("data/*.parquet")})
        if not found:
            raise DataError("there are no parquet files", where=str(self.folder), fix=f"get {self.source.download}")
        return found

    def _image(self, file: str, row: int) -> bytes:
        """Bytes of a source."""
        path = self.folder / file
        with _opened(path, self.source) as parquet:
            sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        for group, rows in enumerate(sizes):
            if row < rows:
                return _images(path, group, self.source)[row]
            row -= rows
        raise DataError("the row does not exist", where=f"{path}, entry {row}", fix=f"get {self.source.download}")


@contextmanager
def _opened(path: Path, source: Source) -> Iterator["ParquetFile"]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError("pyarrow is not installed", where=str(path), fix="pip install 'bernini[parquet]'") from error
    try:
        with pq.ParquetFile(path) as parquet:
            yield parquet
    except (ValueError, OSError) as error:  # pyarrow's own errors are among these
        raise DataError(
            "the file is not the official one", where=str(path), why=str(error), fix=f"get {source.download}"
        ) from error


def _rows(path: Path, source: Source) -> list[Row]:
    """All fields but the images."""
    with _opened(path, source) as parquet:
        if absent := [name for name in (*FIELDS, IMAGE) if name not in parquet.schema_arrow.names]:
            raise DataError(
                f"the column {absent[0]!r} is missing",
                where=str(path),
                why=f"there are {', '.join(parquet.schema_arrow.names)}",
                fix=f"get {source.download}",
            )
        rows: list[Row] = parquet.read(columns=list(FIELDS)).to_pylist()
    return rows


@lru_cache(maxsize=1)
def _images(path: Path, group: int, source: Source) -> list[bytes]:
    """Images of a row group; items come in the order of the file, so that each group is read once."""
    with _opened(path, source) as parquet:
        return [row[IMAGE]["bytes"] for row in parquet.read_row_group(group, columns=[f"{IMAGE}.bytes"]).to_pylist()]

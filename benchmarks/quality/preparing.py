"""The stage that lists what a run makes, and sees that all that it is made from can be read.

``items.jsonl`` has a row for each item: all that is asked for, and ``sources``, the SHA-256 of each of its files.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from benchmarks.quality.folder import Row, digest
from benchmarks.quality.interface import Benchmark, Item
from bernini.errors import ConfigError, DataError
from bernini.files import write_text
from bernini.media import read_image, read_video

IMAGES, TABLES = (".png", ".jpg", ".jpeg", ".webp", ".bmp"), (".parquet",)


class Prepared(NamedTuple):
    """What `prepare` listed.

    Attributes:
        items: Number of items.
        files: Number of different source files.
        sha256: Of the list.
    """

    items: int
    files: int
    sha256: str


def prepare(
    benchmark: Benchmark,
    items: Sequence[Item],
    path: Path,
    *,
    check: bool = False,
    fixed: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Prepared:
    """Open and hash the sources of all items, and write the list, whole or not at all.

    Args:
        benchmark: Names the files.
        items: All items of the run.
        path: The list. Where there is one of the same items, nothing is done.
        check: Open and hash the files in any case.
        fixed: Outputs were made from the list that is there, which therefore has to stay what it is.
        progress: Called with the number of items that are done.

    Raises:
        ConfigError: The list that has to stay is of other items, or of files that have changed.
        DataError: A file cannot be read.
    """
    known, wanted = _read(path), [_asked(item) for item in items]
    same = known is not None and [asked for asked, _ in known] == wanted
    if known is not None and fixed and not same:
        raise ConfigError(
            f"the list is of other items: {len(known)}, and not these {len(items)}",
            where=str(path),
            why="outputs were made from it",
            fix="use another --out",
        )
    if known is not None and same and not check:
        sources = [files for _, files in known]
        progress(len(items))
    else:
        sources = _hash(benchmark, items, progress)
        if known is not None and fixed:
            _compare(path, [files for _, files in known], sources)
        else:
            rows = ({**asked, "sources": files} for asked, files in zip(wanted, sources, strict=True))
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return Prepared(len(items), len({name for files in sources for name in files}), digest([wanted, sources]))


def _compare(path: Path, before: list[dict[str, str]], now: list[dict[str, str]]) -> None:
    changed = sorted(
        {name for a, b in zip(before, now, strict=True) for name in a.keys() | b if a.get(name) != b.get(name)}
    )
    if changed:
        raise ConfigError(
            f"{len(changed)} source files have changed, the first is {changed[0]}",
            where=str(path),
            why="what is made now would come from other sources than what was made before",
            fix="put the files back, or use another --out",
        )


def _hash(benchmark: Benchmark, items: Sequence[Item], progress: Callable[[int], None]) -> list[dict[str, str]]:
    """SHA-256 of the files of each item, by their names."""
    hashes: dict[str, str] = {}
    broken: dict[str, DataError] = {}
    for done, item in enumerate(items, 1):
        for name, file in benchmark.source_files(item).items():
            if name not in hashes and name not in broken:
                try:
                    _open(file)
                    with file.open("rb") as opened:
                        hashes[name] = hashlib.file_digest(opened, "sha256").hexdigest()
                except DataError as error:
                    broken[name] = error
        progress(done)
    if broken:
        first = next(iter(broken.values()))
        raise DataError(
            f"{len(broken)} of {len(broken) + len(hashes)} source files cannot be read, the first: {first.what}",
            where=first.where,
            why=first.why,
            fix="download them again",
        )
    return [{name: hashes[name] for name in benchmark.source_files(item)} for item in items]


def _open(file: Path) -> None:
    """Decode the image, or the first frame of a clip whose index is whole."""
    suffix = file.suffix.lower()
    if suffix in IMAGES:
        read_image(file)
    elif suffix not in TABLES:  # their images were opened when items were read
        read_video(file, max_frames=1)


def _asked(item: Item) -> Row:
    row: Row = json.loads(json.dumps(asdict(item)))
    return row


def _read(path: Path) -> list[tuple[Row, dict[str, str]]] | None:
    """What is asked for and the hashes, item by item; none if there is no list.

    Raises:
        ConfigError: The file is something else.
    """
    if not path.is_file():
        return None
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [(row, row.pop("sources")) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError("the file is no list of items", where=str(path), why=repr(error), fix="delete it") from error

"""Reading official files: every entry is checked as it is read, and an error names file, entry, field and remedy."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.official.source import Source
from bernini.errors import DataError
from bernini.suggest import closest

Row = dict[str, Any]


@dataclass(frozen=True)
class Schema:
    """Fields of an entry.

    Attributes:
        required: Type of each field that every entry has. A text is not empty, ``list`` is one or more texts, and
            ``object`` is anything.
        optional: Type of each field that an entry may have, or have as null.
        closed: Whether other fields are refused. It is off where a release may carry more columns than are used.
    """

    required: Mapping[str, type]
    optional: Mapping[str, type]
    closed: bool = True


def find(source: Source, *places: Path) -> Path:
    """The first of several places at which there is a file.

    Raises:
        DataError: There is none.
    """
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        also = f"; nor is there {', '.join(map(str, places[1:]))}" if len(places) > 1 else ""
        raise DataError(
            f"{places[0].name} is missing", where=str(places[0]), why=f"the file does not exist{also}", fix=_get(source)
        )
    return found


def read_json(path: Path, source: Source, kind: type) -> Any:
    """A JSON file that holds a list or an object.

    Raises:
        DataError: The file is missing, is not JSON, or holds something else.
    """
    text = _text(path, source)
    try:
        content = json.loads(text, object_pairs_hook=lambda pairs: _distinct(pairs, path, source))
    except ValueError as error:
        raise DataError("the file is not JSON", where=str(path), why=str(error), fix=_get(source)) from error
    if not isinstance(content, kind):
        told = "a list" if kind is list else "an object"
        raise DataError(f"the file does not hold {told}", where=str(path), fix=_get(source))
    return content


def read_lines(path: Path, source: Source) -> list[Row]:
    """A file of JSON lines.

    Raises:
        DataError: The file is missing, or a line is not a JSON object.
    """
    rows = []
    for number, line in enumerate(_lines(path, source), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            where = f"{path}, line {number}"
            raise DataError("a line is not JSON", where=where, why=str(error), fix=_get(source)) from error
    return rows


def read_csv(path: Path, source: Source) -> list[Row]:
    """A CSV file with a header.

    Raises:
        DataError: The file is missing, or a row has more or fewer cells than the header: cells are never shifted.
    """
    reader = csv.DictReader(io.StringIO(_text(path, source), newline=""))
    try:
        rows = list(reader)
    except csv.Error as error:
        raise DataError("the file is not CSV", where=str(path), why=str(error), fix=_get(source)) from error
    names = reader.fieldnames or []
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise DataError(
                "a row has not as many cells as the header",
                where=f"{path}, entry {number}",
                why=f"the header has {len(names)}: {', '.join(names)}",
                fix=_get(source),
            )
    return [dict(row) for row in rows]


def checked(rows: Sequence[Any] | Mapping[str, Any], schema: Schema, path: Path, source: Source) -> Iterator[Row]:
    """The entries of a file, each compared with its schema when its turn comes; nulls of optional fields are left out.

    Args:
        rows: Entries by number, or by name.
        schema: Their fields.
        path: The file, for errors.
        source: Where a good one comes from.

    Raises:
        DataError: A field is missing, unknown or of another type.
    """
    known = {**schema.required, **schema.optional}
    for name, row in rows.items() if isinstance(rows, Mapping) else enumerate(rows):
        place = f"{path}, entry {name}"
        if not isinstance(row, dict):
            raise DataError(f"an entry is {row!r:.60}", where=place, why="it is not an object", fix=_get(source))
        for field in (field for field in schema.required if field not in row):
            raise DataError(
                f"the field {field!r} is missing",
                where=f"{place}, field {field}",
                why=f"the entry has {', '.join(map(repr, row)) or 'none'}",
                fix=_get(source),
            )
        if schema.closed and (unknown := sorted(row.keys() - known.keys())):
            raise DataError(
                f"unknown field {unknown[0]!r}",
                where=f"{place}, field {unknown[0]}",
                why=f"entries have {', '.join(known)}: {closest(unknown[0], known)}".removesuffix(": "),
                fix=_get(source),
            )
        entry = {field: value for field, value in row.items() if value is not None or field in schema.required}
        for field in (field for field in known if field in entry):
            _check_type(entry[field], known[field], f"{place}, field {field}", source)
        yield entry


def check_count(found: int, wanted: int, what: str, path: Path, source: Source) -> None:
    """See that a file is whole.

    Raises:
        DataError: There are more or fewer.
    """
    if found != wanted:
        raise DataError(
            f"{found} {what} instead of {wanted}",
            where=str(path),
            why="figures of another set do not compare with published ones",
            fix=_get(source),
        )


def check_counts(found: Sequence[str], wanted: Mapping[str, int], what: str, path: Path, source: Source) -> None:
    """See that there are as many entries of each kind as there should be.

    Raises:
        DataError: A kind is unknown, or has more or fewer.
    """
    counts = Counter(found)
    if unknown := sorted(counts.keys() - wanted.keys()):
        raise DataError(
            f"unknown {what} {unknown[0]!r}", where=str(path), why=f"there are {', '.join(wanted)}", fix=_get(source)
        )
    for kind, number in wanted.items():
        check_count(counts[kind], number, f"entries of {what} {kind!r}", path, source)


def refuse(what: str, path: Path, entry: object, field: str, why: str, source: Source) -> DataError:
    """The error of a field whose value has no meaning."""
    return DataError(what, where=f"{path}, entry {entry}, field {field}", why=why, fix=_get(source))


def read_rewriting(path: Path, prompts: Sequence[str]) -> dict[str, str]:
    """Prompts that are given to the model instead of the official ones.

    Args:
        path: A JSON object from official to rewritten prompts, or a text file with one line for each official prompt.
        prompts: All official prompts, in the order of their file; a prompt that comes twice takes its first line.

    Raises:
        DataError: The file is missing or broken, a prompt has none, or the file has another number of lines.
    """
    own = Source(home="", download="a rewriting of this benchmark's prompts", licence="")
    if path.suffix == ".json":
        rewritten: dict[str, str] = read_json(path, own, dict)
        for prompt in prompts:
            if not isinstance(rewritten.get(prompt), str) or not rewritten[prompt].strip():
                raise DataError("a prompt has no rewritten one", where=str(path), why=repr(prompt), fix=_get(own))
        return {prompt: rewritten[prompt] for prompt in prompts}
    lines = _lines(path, own)
    check_count(len(lines), len(prompts), "lines", path, own)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError("a line is empty", where=f"{path}, line {number}", fix=_get(own))
    return dict(reversed(list(zip(prompts, lines, strict=True))))


def _text(path: Path, source: Source) -> str:
    try:
        return find(source, path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("the file is not UTF-8 text", where=str(path), why=str(error), fix=_get(source)) from error


def _lines(path: Path, source: Source) -> list[str]:
    """Lines of a file, which only line feeds end: prompts may hold other separators."""
    return _text(path, source).replace("\r\n", "\n").removesuffix("\n").split("\n")


def _check_type(value: Any, kind: type, where: str, source: Source) -> None:
    texts = isinstance(value, list) and value and all(isinstance(x, str) and x.strip() for x in value)
    good = {
        str: isinstance(value, str) and bool(value.strip()),
        int: isinstance(value, int) and not isinstance(value, bool),
        list: bool(texts),
        dict: isinstance(value, dict),
        object: True,
    }[kind]
    if not good:
        told = {str: "a text", int: "an integer", list: "a list of texts", dict: "an object"}[kind]
        raise DataError(f"{value!r:.60} is not {told}", where=where, fix=_get(source))


def _distinct(pairs: list[tuple[str, Any]], path: Path, source: Source) -> Row:
    names = Counter(name for name, _ in pairs)
    twice = next((name for name, number in names.items() if number > 1), None)
    if twice is not None:
        raise DataError(
            f"the name {twice!r} comes twice in one object", where=f"{path}, entry {twice}", fix=_get(source)
        )
    return dict(pairs)


def _get(source: Source) -> str:
    return f"get {source.download}"

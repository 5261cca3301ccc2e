"""What a benchmark's files say of its items, before sources are measured."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from benchmarks.quality.official.source import Source
from bernini.errors import DataError

NAME_BYTES = 255  # of one part of a path, on all usual file systems


@dataclass(frozen=True)
class Draft:
    """An item without a size.

    Attributes:
        id: Unique within the benchmark; a `word`, since reports name files by it.
        task: Name in the task table.
        prompt: The official prompt.
        output: Official file name of the output.
        metrics: Names of the scores that it gets.
        category: The benchmark's own kind of item.
        repeat: Which of several outputs for one prompt.
        videos: Source clips, relative to the benchmark's folder.
        images: Source images, likewise.
        extra: What scoring needs besides, plain JSON.
    """

    id: str
    task: str
    prompt: str
    output: str
    metrics: tuple[str, ...]
    category: str = ""
    repeat: int = 0
    videos: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def word(text: str) -> str:
    """A text as a part of an id: what has no place in a file name becomes ``_``."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)


def check_drafts(drafts: Sequence[Draft], folder: Path, source: Source) -> None:
    """See that all ids are words, that no two items share an id or a file, and that each file can have its name.

    Raises:
        DataError: It is not so.
    """
    for what, names in (("id", [draft.id for draft in drafts]), ("output file", [draft.output for draft in drafts])):
        twice = next((name for name, number in Counter(names).items() if number > 1), None)
        if twice is not None:
            raise DataError(
                f"two entries have the {what} {twice!r}",
                where=str(folder),
                why="one output would take the place of the other",
                fix=f"get {source.download}",
            )
    for draft in drafts:
        why = _flaw(draft.output) if draft.id == word(draft.id) else "an id holds letters, digits, -, _ and . alone"
        if why:
            raise DataError(
                f"an output cannot be called {draft.output!r}",
                where=f"{folder}, entry {draft.id}",
                why=why,
                fix=f"get {source.download}",
            )


def _flaw(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        return "it does not stay in its folder"
    if str(path) != name:
        return f"its file would be {path}"
    if long := next((part for part in path.parts if len(part.encode()) > NAME_BYTES), None):
        return f"{len(long.encode())} bytes are more than the {NAME_BYTES} that a name may have"
    return ""

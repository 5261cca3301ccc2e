"""`bernini data info`: what a folder of shards is."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from datamodules.index import INDEX_VERSION, Entry
from datamodules.tools.folder import Folder


def describe(folder: Folder) -> dict[str, Any]:
    """Samples, shards, bytes, tasks, columns, fingerprint and index version of a folder.

    Columns are what a sample is stored as: ``pixels``, ``posterior``, ``vit`` and ``text`` of `bernini prepare`, or the
    suffixes of tars of others. Of the samples of one task with the same members the first is opened.

    Returns:
        Plain JSON; tasks and columns with the number of samples that have them.

    Raises:
        BadSample: A sample that was opened is damaged.
        DataError: The row of one cannot be understood.
        ServiceError: The service does not give it.
    """
    kinds: dict[tuple[str, ...], list[Entry]] = {}
    for entry in folder.entries:
        kinds.setdefault((entry.task, *sorted(entry.members)), []).append(entry)
    columns: Counter[str] = Counter()
    for entries in kinds.values():
        for column in _columns(folder, entries[0]):
            columns[column] += len(entries)
    return {
        "folder": folder.name,
        "samples": len(folder.entries),
        "shards": len(folder.index.shards),
        "bytes": sum(shard.bytes for shard in folder.index.shards),
        "tasks": dict(Counter(entry.task for entry in folder.entries if entry.task).most_common()),
        "columns": dict(columns.most_common()),
        "fingerprint": folder.index.fingerprint,
        "index": INDEX_VERSION,
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What `describe` found, for the terminal."""
    for name, value in found.items():
        if isinstance(value, dict):
            text = ", ".join(f"{key} {count}" for key, count in value.items()) or "none: not of `bernini prepare`"
        else:
            text = f"{value / 1e6:.1f} MB" if name == "bytes" else str(value)
        yield f"{name:<13}{text}"


def _columns(folder: Folder, entry: Entry) -> list[str]:
    if not entry.task:
        return list(entry.members)
    record = folder.record(entry)
    named = [name for visual in record.visuals for name in visual.features] + list(record.texts)
    pixels = ["pixels"] if any(visual.pixels for visual in record.visuals) else []
    return list(dict.fromkeys([*pixels, *(name.partition(".")[0] for name in named)]))

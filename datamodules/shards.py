"""Folders of WebDataset shards: ordinary tars beside an index of what lies where in them.

Nothing is ever unpickled, extracted or fetched: shards are local, a member is read by its offset, and only regular
files with a known suffix are accepted.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bernini.conversation import Conversation
from bernini.errors import ConfigError, DataError
from bernini.files import replacing
from datamodules.buckets import Bounds
from datamodules.records import ROW, WHOLE, decode, encode, parse_row

KEY = re.compile(r"[a-z0-9_-]{1,64}")
SUFFIXES = frozenset({"json", "txt", "mp4", "png", "jpg", "safetensors"})
MAX_MEMBER = 4 << 30  # bytes
INDEX, INDEX_VERSION = "index.json", 1
_AGAIN = "write the shards again with `bernini prepare`"


@dataclass(frozen=True)
class Entry:
    """Where one sample lies.

    Attributes:
        shard: File name of its shard.
        key: Sample key.
        task: Task of the sample.
        members: Suffix -> (offset, size) in bytes.
    """

    shard: str
    key: str
    task: str
    members: dict[str, tuple[int, int]]


def write_shards(
    conversations: Iterable[Conversation],
    folder: str | Path,
    *,
    samples_per_shard: int = 1000,
    shard_bytes: int = 1 << 30,
    prefix: str = "shard",
    lossless: bool = False,
) -> "Shards":
    """Write samples as ``PREFIX-000000.tar`` and so on, with an index beside them.

    All shards get their names when the last one is complete, so that an interrupted run leaves no half data set.

    Args:
        conversations: Samples; a sample without a key is numbered.
        folder: Folder to write to; it must not hold shards yet.
        samples_per_shard: Most samples of a shard.
        shard_bytes: Size in bytes after which a new shard is begun.
        prefix: Start of the file names.
        lossless: Keep the exact pixels of clips, as for the toy world.

    Returns:
        The folder, opened.

    Raises:
        ConfigError: The folder is not local or holds shards already.
        DataError: No sample, a key that is not allowed or comes twice, or a visual that cannot be stored.
    """
    from webdataset import TarWriter

    root = _local(folder)
    if any(root.glob("*.tar")):
        raise ConfigError("the folder already holds shards", where=str(root), fix="name another folder or delete it")
    keys: set[str] = set()
    shards = count = size = 0
    with ExitStack() as complete, ExitStack() as current:
        for number, conversation in enumerate(conversations):
            key = _new_key(conversation.key or f"{number:08d}", keys)
            sample = {"__key__": key, **encode(conversation, lossless=lossless)}
            if shards == 0 or count >= samples_per_shard or size >= shard_bytes:
                current.close()
                path = complete.enter_context(replacing(root / f"{prefix}-{shards:06d}.tar"))
                file = current.enter_context(path.open("wb"))
                tar = current.enter_context(TarWriter(file, encoder=False, mtime=0, user="", group=""))
                shards, count, size = shards + 1, 0, 0
            size += tar.write(sample)
            count += 1
        if not keys:
            raise DataError("there is no sample to write", where=str(root), fix="check the input")
    _write_index(root)
    return Shards(root)


def _new_key(key: str, keys: set[str]) -> str:
    if not KEY.fullmatch(key):
        raise DataError(f"the key {key!r} is not allowed", why=f"keys are {KEY.pattern}", fix="rename the sample")
    if key in keys:
        raise DataError(f"the key {key!r} comes twice", why="keys are unique in a data set", fix="rename the sample")
    keys.add(key)
    return key


class Shards:
    """A folder of shards, open for reading by position.

    Args:
        folder: Local folder with ``*.tar`` and, to open it faster, the ``index.json`` that `write_shards` made.

    Attributes:
        folder: The folder.
        entries: Every sample, in the order of shards and of samples in them.
        fingerprint: Hash of what the samples are called and where they lie.

    Raises:
        ConfigError: The folder is not local or holds no shards.
        DataError: A shard is damaged, or is not the one that was indexed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = _local(folder)
        found = {path.name: path.stat().st_size for path in sorted(self.folder.glob("*.tar"))}
        if not found:
            raise ConfigError("no shards here", where=str(self.folder), fix="write them with `bernini prepare`")
        path = self.folder / INDEX
        index = _read_index(path) if path.is_file() else _scan_all(self.folder)
        indexed = {shard["name"]: shard["bytes"] for shard in index}
        if indexed != found:
            names = sorted(name for name in indexed | found if indexed.get(name) != found.get(name))
            raise DataError(
                f"{names[0]} has {found.get(names[0], 0)} bytes, the index says {indexed.get(names[0], 0)}",
                where=str(path),
                why=f"{len(names)} shard(s) changed, went or came since the index was made",
                fix=f"copy the folder again, or delete {INDEX} if the shards are right",
            )
        self.entries = [
            Entry(shard["name"], s["key"], s["task"], {n: (at, size) for n, (at, size) in s["members"].items()})
            for shard in index
            for s in shard["samples"]
        ]
        self.fingerprint = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.entries)

    def members(self, number: int) -> dict[str, bytes]:
        """Bytes of every member of a sample, by suffix.

        Raises:
            DataError: The shard ends before the member does.
        """
        entry = self.entries[number]
        members = {}
        with (self.folder / entry.shard).open("rb") as file:
            for suffix, (offset, size) in entry.members.items():
                file.seek(offset)
                members[suffix] = file.read(size)
                if len(members[suffix]) < size:
                    raise DataError("the shard is cut short", where=f"{self._where(entry)}.{suffix}", fix=_AGAIN)
        return members

    def read(self, number: int, bounds: Bounds = WHOLE) -> Conversation:
        """Decode a sample; see `datamodules.records.decode`."""
        entry = self.entries[number]
        where = self._where(entry)
        return decode(self.members(number), key=entry.key, where=where, bounds=bounds)

    def _where(self, entry: Entry) -> str:
        return f"{self.folder / entry.shard}:{entry.key}"


def _local(folder: str | Path) -> Path:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", str(folder)):
        raise ConfigError(
            "shards are read from local folders only", where=str(folder), why="a URL, or a command, is never opened",
            fix="copy the shards to this machine",
        )  # fmt: skip
    return Path(folder)


def _write_index(root: Path) -> None:
    with replacing(root / INDEX) as path:
        path.write_text(json.dumps({"version": INDEX_VERSION, "shards": _scan_all(root)}))


def _read_index(path: Path) -> list[dict[str, Any]]:
    try:
        index = json.loads(path.read_text())
        if index["version"] != INDEX_VERSION:
            raise ValueError(f"version {index['version']} instead of {INDEX_VERSION}")
        return index["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the index cannot be read: {error}", where=str(path), fix=f"delete {INDEX}") from error


def _scan_all(root: Path) -> list[dict[str, Any]]:
    return [
        {"name": path.name, "bytes": path.stat().st_size, "samples": list(_scan(path))}
        for path in sorted(root.glob("*.tar"))
    ]


def _scan(path: Path) -> Iterator[dict[str, Any]]:
    """Samples of one shard, from its tar headers and its rows."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                _check_member(member, key, suffix, str(path))
                if suffix in samples.setdefault(key, {}):
                    raise DataError("a member comes twice", where=f"{path}:{member.name}", fix=_AGAIN)
                samples[key][suffix] = (member.offset_data, member.size)
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"the shard cannot be read: {error}", where=str(path), fix=_AGAIN) from error
    with path.open("rb") as file:
        # A tar ends in blocks of zeros; tarfile takes a damaged header in the middle for the end and says nothing.
        file.seek(end)
        tail = file.read(1024)
        if len(tail) < 1024 or any(tail):
            why = "a header is damaged, or the file is cut short"
            raise DataError(f"the shard breaks off at byte {end}", where=str(path), why=why, fix=_AGAIN)
        for key, members in samples.items():
            offset, size = members.get(ROW, (0, 0))
            file.seek(offset)
            row = parse_row({ROW: file.read(size)} if size else {}, f"{path}:{key}")
            yield {"key": key, "task": row.get("task"), "members": members}


def _check_member(member: tarfile.TarInfo, key: str, suffix: str, shard: str) -> None:
    faults = {
        "it is not a regular file": not member.isreg(),
        f"its key is not {KEY.pattern}": not KEY.fullmatch(key),
        f"its suffix is none of {', '.join(sorted(SUFFIXES))}": suffix.rpartition(".")[2] not in SUFFIXES,
        f"it has more than {MAX_MEMBER} bytes": member.size > MAX_MEMBER,
    }
    for why, wrong in faults.items():
        if wrong:
            raise DataError("a member is not allowed", where=f"{shard}:{member.name}", why=why, fix=_AGAIN)

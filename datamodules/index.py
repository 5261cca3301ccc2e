"""The index of a folder of shards: what lies where, and the hashes that say whether it still is what it was.

``index.jsonl`` is text beside ordinary tars. Its first line holds version, counts and the fingerprint of the data set.
A line for each shard follows: name, size in bytes, sha256, number of samples, and a hash over their lines, which come
next: key, task, span, for each member offset, size, hash and, for clips, codec, width, height, frames and fps, and the
size of each image and clip.

A shard has sha256, which ``sha256sum`` checks anywhere. A member, whose hash is checked at every read, has xxh3-128:
at 31 GB/s a core instead of 1.7 it costs nothing beside decoding or prepared features. It finds damage; whoever can
write shards on purpose can write an index too, and is kept in bounds by what is refused, not by a hash.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from xxhash import xxh3_128_hexdigest

from bernini.errors import DataError

INDEX, INDEX_VERSION = "index.jsonl", 2
KEY = re.compile(r"[a-z0-9_-]{1,64}")
MAX_SIZES = {  # bytes of a member; nothing larger is read
    "json": 16 << 20,
    "txt": 1 << 20,
    "png": 256 << 20,
    "jpg": 256 << 20,
    "mp4": 4 << 30,
    "safetensors": 4 << 30,
}
MAX_SPAN = 8 << 30  # bytes of a sample
_SUFFIX = re.compile(rf"([a-z][a-z0-9_]{{0,31}}\.)?({'|'.join(MAX_SIZES)})")
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}\.tar")
_AGAIN = f"delete {INDEX}, and make it again with `bernini data index` if the shards are right"


@dataclass(frozen=True, slots=True)
class Video:
    """What is known of a clip without decoding it.

    Attributes:
        codec: FFmpeg's name, such as ``h264``.
        width: Pixels as stored, before any rotation.
        height: Pixels as stored.
        frames: Number of frames at the rate ``fps``.
        fps: Frames per second, as `bernini.decoding.Probe` has it.
    """

    codec: str
    width: int
    height: int
    frames: int
    fps: float


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample.

    Attributes:
        at: Byte of the shard at which it begins.
        size: Bytes.
        xxh3: Hash of its bytes, xxh3-128 in hexadecimal.
        video: What it shows, if it is a clip.
    """

    at: int
    size: int
    xxh3: str
    video: Video | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """Size of an image or clip that is rendered, in pixels.

    Attributes:
        frames: Number of frames.
        height: Height as stored.
        width: Width as stored.
        prepared: Whether it is a posterior, and so keeps its size when it is read.
    """

    frames: int
    height: int
    width: int
    prepared: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one sample lies.

    Attributes:
        shard: File name of its shard.
        key: Sample key.
        task: Task of the sample; empty for one that `bernini prepare` has not written.
        at: Byte of the shard at which the sample begins, with the header of its first member.
        span: Bytes from there to the end of its last member.
        members: Suffix -> member.
        shown: Its images and clips, but for those that are stored as a planner sees them alone.
    """

    shard: str
    key: str
    task: str
    at: int
    span: int
    members: dict[str, Member]
    shown: list[Shown]

    @property
    def address(self) -> str:
        """A name of the span's content: the same for the same members at the same places of it."""
        parts = [(suffix, m.at - self.at, m.size, m.xxh3) for suffix, m in self.members.items()]
        return xxh3_128_hexdigest(json.dumps(parts).encode())


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar.

    Attributes:
        name: File name.
        bytes: Size.
        sha256: Hash of the file in hexadecimal.
        entries: Its samples, in order.
    """

    name: str
    bytes: int
    sha256: str
    entries: list[Entry]


@dataclass(frozen=True)
class Index:
    """What a folder of shards holds.

    Attributes:
        shards: Shards, by name.
        fingerprint: Hash over the lines of the shards, and so over every byte of the data set and of the index.
    """

    shards: list[Shard]
    fingerprint: str


def suffix_fault(suffix: str, size: int) -> str | None:
    """Why a member with this suffix and size in bytes is not allowed, or nothing."""
    match = _SUFFIX.fullmatch(suffix)
    if not match:
        known = ", ".join(MAX_SIZES)
        return f"its suffix {suffix!r} is not NAME.EXT or EXT, a NAME beginning with a letter, EXT one of {known}"
    limit = MAX_SIZES[match[2]]
    return f"it has {size} bytes, {match[2]} members may have {limit}" if not 0 <= size <= limit else None


def shard_fault(name: str) -> str | None:
    """Why a shard may not have this file name, or nothing."""
    return None if _SHARD.fullmatch(name) else f"the name of a shard is {_SHARD.pattern}"


def index_text(shards: Iterable[Shard]) -> str:
    """The text of ``index.jsonl``."""
    heads, lines = [], []
    for shard in sorted(shards, key=lambda shard: shard.name):
        rows = [_entry_line(entry) for entry in shard.entries]
        heads.append(_head(shard.name, shard.bytes, shard.sha256, rows))
        lines += [heads[-1], *rows]
    count = len(lines) - len(heads)
    first = {"index": INDEX_VERSION, "shards": len(heads), "samples": count, "fingerprint": _fingerprint(heads)}
    return "".join(f"{line}\n" for line in [json.dumps(first), *lines])


def parse_index(text: str, where: str) -> Index:
    """Read the text of ``index.jsonl``, of which nothing is taken on trust.

    Args:
        text: The text.
        where: Path or URL of the index, for errors.

    Raises:
        DataError: It is of another version, damaged, or leads to what is not allowed.
    """
    lines = iter(enumerate(text.splitlines(), 1))
    number, shards, heads = 0, [], []
    try:
        number, line = next(lines, (1, "{}"))
        first = _object(line)
        if first.get("index") != INDEX_VERSION:
            raise ValueError(f"version {first.get('index')} instead of {INDEX_VERSION}")
        for number, head in lines:  # noqa: B007 - the error says where
            row = _object(head)
            name, size = str(row["shard"]), _number(row["bytes"])
            if fault := shard_fault(name):
                raise ValueError(f"the shard {name!r} is not allowed: {fault}")
            rows = [line for _, (_, line) in zip(range(_number(row["count"])), lines, strict=False)]
            if head != _head(name, size, row["sha256"], rows):
                raise ValueError(f"the lines of {name} are not those that were written")
            entries = [_entry(name, size, _object(line)) for line in rows]
            heads.append(head)
            shards.append(Shard(name, size, row["sha256"], entries))
        if _fingerprint(heads) != first.get("fingerprint"):
            raise ValueError("lines are missing, or are not those that were written")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"the index cannot be read: {error}", where=f"{where}, line {number}", fix=_AGAIN) from error
    return Index(shards, str(first["fingerprint"]))


def _fingerprint(heads: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(heads)).encode()).hexdigest()[:16]


def _head(name: str, size: int, sha256: str, rows: Sequence[str]) -> str:
    lines = xxh3_128_hexdigest("\n".join(rows).encode())
    return json.dumps({"shard": name, "bytes": size, "sha256": sha256, "count": len(rows), "lines": lines})


def _entry_line(entry: Entry) -> str:
    members = {
        suffix: {"at": m.at, "size": m.size, "xxh3": m.xxh3, **({"video": asdict(m.video)} if m.video else {})}
        for suffix, m in entry.members.items()
    }
    row = {"key": entry.key, "task": entry.task, "at": entry.at, "span": entry.span, "members": members}
    return json.dumps({**row, "shown": [astuple(shown) for shown in entry.shown]})


def _entry(shard: str, size: int, row: Mapping[str, Any]) -> Entry:
    key, task, at, span = row["key"], row["task"], _number(row["at"]), _number(row["span"])
    if not KEY.fullmatch(key):
        raise ValueError(f"the key {key!r} is not {KEY.pattern}")
    if not isinstance(task, str):
        raise ValueError(f"the task {task!r} of {key} is no name")
    if span > MAX_SPAN or at + span > size:
        raise ValueError(f"{key} spans {span} bytes from {at} on, of {size}")
    members = dict(_members(key, at, at + span, row["members"]))
    if not members:
        raise ValueError(f"{key} has no members")
    shown = [Shown(_number(f), _number(h), _number(w), bool(prepared)) for f, h, w, prepared in row["shown"]]
    return Entry(shard, key, task, at, span, members, shown)


def _members(key: str, start: int, end: int, rows: Mapping[str, Any]) -> Iterator[tuple[str, Member]]:
    for suffix, row in rows.items():
        at, size = _number(row["at"]), _number(row["size"])
        if fault := suffix_fault(suffix, size):
            raise ValueError(f"{key}.{suffix} is not allowed: {fault}")
        if at < start or at + size > end:
            raise ValueError(f"{key}.{suffix} lies outside its sample")
        yield suffix, Member(at, size, str(row["xxh3"]), _video(row["video"]) if "video" in row else None)


def _video(row: Mapping[str, Any]) -> Video:
    width, height, frames = (_number(row[name]) for name in ("width", "height", "frames"))
    return Video(str(row["codec"]), width, height, frames, float(row["fps"]))


def _object(line: str) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("a line is no JSON object")
    return row


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no number")
    return value

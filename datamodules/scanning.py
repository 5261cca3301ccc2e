"""Making the index of a folder of tars, of which nothing is taken on trust.

Only headers are followed and only regular files with known suffixes are read; nothing is extracted or unpickled, and
clips are opened in a process that may die.
"""

import hashlib
import json
import tarfile
from collections.abc import Callable, Collection, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from bernini.decoding import Limits
from bernini.errors import ConfigError, DataError
from bernini.files import write_text
from bernini.media import image_size
from datamodules.decoder import decoder
from datamodules.index import (
    INDEX,
    KEY,
    Entry,
    Index,
    Member,
    Shard,
    Shown,
    Video,
    index_text,
    parse_index,
    shard_fault,
    suffix_fault,
)
from datamodules.records import ROW, TENSORS, parse_row, parse_tensors
from datamodules.storage import Local, StorageConfig

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MEND = "write the shard again, as a plain tar with the members of each sample one after the other"


def index_folder(
    folder: str | Path, require: Collection[str] = (), *, limits: Limits | None = None, allow_links: bool = False
) -> Index:
    """Write the index of a folder's shards.

    Args:
        folder: Local folder with ``*.tar``.
        require: Suffixes that every sample must have.
        limits: What a clip may cost; null takes the defaults.
        allow_links: Whether shards may be symbolic links.

    Returns:
        The index.

    Raises:
        ConfigError: The folder is not local, has no shards, or has an index.
        DataError: A shard is damaged, or holds what is not allowed.
    """
    local = Local(folder, StorageConfig(allow_links=allow_links))
    names = local.names()
    if not names:
        raise ConfigError("no shards here", where=str(folder), fix="write them with `bernini prepare`")
    if (local.root / INDEX).exists():
        raise ConfigError(
            "the folder has an index", where=str(local.root / INDEX),
            why="a new one would vouch for whatever has happened to the shards since",
            fix=f"delete {INDEX} if the shards are right",
        )  # fmt: skip
    shards = [scan(local, name, limits or Limits(), require) for name in names]
    text = index_text(shards)
    write_text(local.root / INDEX, text)
    return parse_index(text, str(local.root / INDEX))


def scan(local: Local, name: str, limits: Limits, require: Collection[str] = ()) -> Shard:
    """What one shard holds: its headers are followed, every byte is hashed, clips are probed.

    Args:
        local: Its folder.
        name: Its file name.
        limits: What an image or a clip may cost.
        require: Suffixes that every sample must have.

    Raises:
        DataError: The shard is damaged, or holds what is not allowed.
    """
    where = local.where(name)
    if fault := shard_fault(name):
        raise DataError("a shard is not allowed", where=where, why=fault, fix="rename it")
    with local.open(name) as file:
        _check_plain(file, where)
        samples = _follow(file, where)
        entries = [_entry(file, name, key, members, where, limits, require) for key, members in samples.items()]
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Shard(name, file.tell(), sha256, entries)


def _check_plain(file: BufferedReader, where: str) -> None:
    start = file.read(6)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                "the shard is compressed", where=where, why=f"{kind}: members cannot be read by their offset", fix=_MEND
            )
    file.seek(0)


def _follow(file: BufferedReader, where: str) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Headers of every member: key -> suffix -> header."""
    size = file.seek(0, 2)
    file.seek(0)
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    last = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if fault := _fault(member, key, suffix, size):
                    raise DataError("a member is not allowed", where=f"{where}:{member.name}", why=fault, fix=_MEND)
                if suffix in samples.get(key, {}):
                    raise DataError("a member comes twice", where=f"{where}:{member.name}", fix=_MEND)
                if key in samples and key != last:
                    why = f"members of {last} lie between it and the others of its sample"
                    raise DataError("a member is apart", where=f"{where}:{member.name}", why=why, fix=_MEND)
                samples.setdefault(key, {})[suffix] = member
                last = key
            end = tar.offset
    except (tarfile.TarError, EOFError, OverflowError, RecursionError, ValueError) as error:
        raise DataError(f"the shard cannot be read: {error}", where=where, fix=_MEND) from error
    _check_end(file, end, size, where)
    return samples


def _fault(member: tarfile.TarInfo, key: str, suffix: str, size: int) -> str | None:
    if not member.isreg():
        kinds = {
            "a directory": member.isdir(),
            "a symbolic link": member.issym(),
            "a hard link": member.islnk(),
            "a device or pipe": member.isdev(),
        }
        return f"it is {next((kind for kind, true in kinds.items() if true), 'of an unknown type')}, not a regular file"
    if member.issparse():
        return "it is sparse: its bytes are not in the shard as they are"
    if not KEY.fullmatch(key):
        return f"its key, the name up to the first dot, is not {KEY.pattern}"
    if member.size > 0 and member.offset_data + member.size > size:
        return f"it claims {member.size} bytes, the shard ends before that"
    return suffix_fault(suffix, member.size)


def _check_end(file: BufferedReader, end: int, size: int, where: str) -> None:
    """A tar ends in zeros; tarfile takes a damaged header in the middle for the end and says nothing."""
    file.seek(end)
    zeros = size - end >= 1024
    while zeros and (block := file.read(1 << 20)):
        zeros = not any(block)
    if not zeros:
        why = "a header is damaged, or the file is cut short"
        raise DataError(f"the shard breaks off at byte {end}", where=where, why=why, fix=_MEND)


def _entry(
    file: BufferedReader,
    shard: str,
    key: str,
    found: dict[str, tarfile.TarInfo],
    where: str,
    limits: Limits,
    require: Collection[str],
) -> Entry:
    where = f"{where}:{key}"
    members: dict[str, Member] = {}
    row: dict[str, Any] = {}
    for suffix, header in found.items():
        file.seek(header.offset_data)
        data = file.read(header.size)
        video = _video(data, limits, f"{where}.{suffix}") if suffix.endswith("mp4") else None
        members[suffix] = Member(header.offset_data, header.size, xxh3_128_hexdigest(data), video)
        if suffix == ROW:
            row = _row(data, where)
    for suffix in sorted({*require, *_named(row)} - members.keys()):
        raise DataError(f"{suffix} of the sample is missing", where=where, why="the shard is damaged", fix=_MEND)
    start = next(iter(found.values())).offset
    end = max(member.at + member.size for member in members.values())

    def read(suffix: str) -> bytes:
        file.seek(members[suffix].at)
        return file.read(members[suffix].size)

    shown = list(_shown(row, members, read, limits, where))
    return Entry(shard, key, row.get("task", ""), start, end - start, members, shown)


def _shown(
    row: dict[str, Any], members: dict[str, Member], read: Callable[[str], bytes], limits: Limits, where: str
) -> Iterator[Shown]:
    """Sizes of the visuals of a row; a posterior goes before pixels."""
    tensors = parse_tensors({TENSORS: read(TENSORS)}, where) if TENSORS in members else {}
    for visual in row.get("visuals", []):
        if not isinstance(visual, dict):
            continue
        if isinstance(name := visual.get("posterior"), str) and name in tensors:
            if tensors[name].ndim != 4:
                what = f"{name} has shape {list(tensors[name].shape)}"
                raise DataError(what, where=f"{where}.{TENSORS}", why="posteriors are [2C, t, h, w]", fix=_MEND)
            _, frames, height, width = tensors[name].shape
            yield Shown(1 + 4 * (frames - 1), 8 * height, 8 * width, True)
        elif isinstance(name := visual.get("pixels"), str):
            video = members[name].video
            found = video and (video.frames, video.height, video.width)
            yield Shown(*(found or (1, *image_size(read(name), f"{where}.{name}", limits))), False)


def _row(data: bytes, where: str) -> dict[str, Any]:
    """The row of a sample of ours; nothing of other JSON."""
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the row is not JSON: {error}", where=f"{where}.{ROW}", fix=_MEND) from error
    return parse_row({ROW: data}, where) if isinstance(row, dict) and "schema" in row else {}


def _named(row: dict[str, Any]) -> Iterator[str]:
    """Members that a row speaks of."""
    for visual in row.get("visuals", []):
        if isinstance(visual, dict) and isinstance(visual.get("pixels"), str):
            yield visual["pixels"]
        if isinstance(visual, dict) and visual.keys() & {"posterior", "vit"}:
            yield TENSORS


def _video(data: bytes, limits: Limits, where: str) -> Video:
    probed = decoder(limits).probe(data, where)
    return Video(probed.codec, probed.width, probed.height, probed.frames, probed.fps)

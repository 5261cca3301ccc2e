"""Folders of WebDataset shards, local or behind a URL: ordinary tars beside an index of what lies where in them.

Nothing is ever unpickled, extracted or run. A sample is one read at an offset, and served when its bytes have the
hashes of the index.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from xxhash import xxh3_128_hexdigest

from bernini.conversation import Conversation
from bernini.decoding import Limits
from bernini.errors import BadSample, ConfigError, DataError
from bernini.files import replacing
from datamodules.buckets import Bounds
from datamodules.cache import Cache
from datamodules.index import INDEX, KEY, Entry, parse_index
from datamodules.records import ROW, WHOLE, decode, encode
from datamodules.scanning import index_folder
from datamodules.storage import Local, StorageConfig, open_store

if TYPE_CHECKING:
    from webdataset import TarWriter

_AGAIN = "copy the shard again, or write it again with `bernini prepare`"


def write_shards(
    conversations: Iterable[Conversation],
    folder: str | Path,
    *,
    samples_per_shard: int = 1000,
    shard_bytes: int = 1 << 30,
    lossless: bool = False,
    limits: Limits | None = None,
) -> "Shards":
    """Write samples as ``PREFIX-000000.tar`` and so on, with an index beside them.

    All shards get their names when the last one is complete, so that an interrupted run leaves no half data set.

    Args:
        conversations: Samples; a sample without a key is numbered.
        folder: Folder to write to; it must not hold shards yet.
        samples_per_shard: Most samples of a shard.
        shard_bytes: Size in bytes after which a new shard is begun.
        lossless: Keep the exact pixels of clips, as for the toy world.
        limits: What a clip may cost when it is looked at for the index; null takes the defaults.

    Returns:
        The folder, opened.

    Raises:
        ConfigError: The folder is not local or holds shards already.
        DataError: No sample, a key that is not allowed or comes twice, or a visual that cannot be stored.
    """
    root = Local(folder, StorageConfig()).root
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
                path = complete.enter_context(replacing(root / f"shard-{shards:06d}.tar"))
                tar = current.enter_context(_tar(path))
                shards, count, size = shards + 1, 0, 0
            size += tar.write(sample)
            count += 1
        if not keys:
            raise DataError("there is no sample to write", where=str(root), fix="check the input")
    index_folder(root, limits=limits)
    return Shards(root)


def write_shard(path: Path, conversations: Iterable[Conversation], *, lossless: bool = False) -> bool:
    """Write samples as one tar, which appears when it is complete; no file without a sample.

    Args:
        path: Final name.
        conversations: Samples with keys.
        lossless: Keep the exact pixels of clips.

    Returns:
        Whether there was a sample.

    Raises:
        DataError: A key that is not allowed or comes twice, or a visual that cannot be stored.
    """
    keys: set[str] = set()
    samples = iter(conversations)
    if (first := next(samples, None)) is None:
        return False
    with replacing(path) as temporary, _tar(temporary) as tar:
        for conversation in chain([first], samples):
            key = _new_key(conversation.key, keys)
            tar.write({"__key__": key, **encode(conversation, lossless=lossless)})
    return True


@contextmanager
def _tar(path: Path) -> Iterator["TarWriter"]:
    """A tar to write to, the same bytes for the same samples."""
    from webdataset import TarWriter

    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
        yield tar


def _new_key(key: str, keys: set[str]) -> str:
    if not KEY.fullmatch(key):
        raise DataError(f"the key {key!r} is not allowed", why=f"keys are {KEY.pattern}", fix="rename the sample")
    if key in keys:
        raise DataError(f"the key {key!r} comes twice", why="keys are unique in a data set", fix="rename the sample")
    keys.add(key)
    return key


class Shards:
    """Samples of a folder of shards, read by position.

    Args:
        folder: Local folder, or URL, with ``*.tar`` and the ``index.jsonl`` that `bernini prepare` or
            `bernini data index` made.
        storage: How it is reached.

    Attributes:
        folder: The folder.
        entries: Every sample, in the order of shards and of samples in them.
        fingerprint: Hash of the index, and so of all that it says of the data.

    Raises:
        ConfigError: The place is never opened, or holds no index.
        DataError: The index is damaged, or a sample is none that `bernini prepare` has written.
    """

    def __init__(self, folder: str | Path, storage: StorageConfig | None = None) -> None:
        storage = storage or StorageConfig()
        self.folder, self.store, self.cache, self.rereads = str(folder), open_store(folder, storage), None, 0
        if not isinstance(self.store, Local):  # on the way from elsewhere bytes get lost
            self.rereads = storage.retries
            self.cache = Cache(storage.cache, int(storage.cache_gb * 1e9)) if storage.cache else None
        index = parse_index(self.store.text(INDEX), self.store.where(INDEX))
        self.entries = [entry for shard in index.shards for entry in shard.entries]
        self.fingerprint = index.fingerprint
        self._sizes = {shard.name: shard.bytes for shard in index.shards}
        if isinstance(self.store, Local):
            self._check_files(self.store)
        for entry in self.entries:
            if not entry.task:
                why = "it was not written by `bernini prepare`"
                raise DataError("the sample has no row", where=f"{self._where(entry)}.{ROW}", why=why, fix=_AGAIN)

    def _check_files(self, local: Local) -> None:
        found = set(local.names())
        if away := sorted(found ^ self._sizes.keys()):
            what = "is not in the index" if away[0] in found else "is in the index but not here"
            raise DataError(
                f"{away[0]} {what}", where=local.where(INDEX), why=f"{len(away)} shard(s) came or went since",
                fix=f"copy the folder again, or delete {INDEX} and make it with `bernini data index`",
            )  # fmt: skip
        for name, size in self._sizes.items():
            with local.open(name) as file:
                now = file.seek(0, 2)
            if now != size:
                warnings.warn(
                    f"{local.where(name)} has {now} bytes, the index says {size}: what has changed in it is not served",
                    stacklevel=4,
                )

    def __len__(self) -> int:
        return len(self.entries)

    def members(self, number: int) -> dict[str, bytes]:
        """Bytes of every member of a sample, by suffix, each of which has the hash of the index.

        Raises:
            BadSample: A member's bytes are not those that were indexed.
            DataError: A remote shard is not the one that was indexed.
            ServiceError: The service does not give it.
        """
        entry = self.entries[number]
        if self.cache and (held := self.cache.get(entry.address)) is not None:
            try:
                return self._checked(entry, held)
            except BadSample:
                self.cache.discard(entry.address)
        span, members = self._fetched(entry, self.rereads)
        if self.cache:
            self.cache.put(entry.address, span)
        return members

    def _fetched(self, entry: Entry, rereads: int) -> tuple[bytes, dict[str, bytes]]:
        span = self.store.read(entry.shard, self._sizes[entry.shard], entry.at, entry.span)
        try:
            return span, self._checked(entry, span)
        except BadSample:
            self.store.check(entry.shard, self._sizes[entry.shard])
            if not rereads:
                raise
        return self._fetched(entry, rereads - 1)

    def _checked(self, entry: Entry, span: bytes) -> dict[str, bytes]:
        members = {}
        for suffix, member in entry.members.items():
            start = member.at - entry.at
            members[suffix] = span[start : start + member.size]
            if xxh3_128_hexdigest(members[suffix]) != member.xxh3:
                cut = len(members[suffix]) < member.size
                raise BadSample(
                    "the shard is cut short" if cut else "the bytes are not those that were indexed",
                    shard=self.store.where(entry.shard), key=entry.key, member=suffix, offset=member.at,
                    why="the shard was damaged or replaced after it was indexed", fix=_AGAIN,
                )  # fmt: skip
        return members

    def read(self, number: int, bounds: Bounds = WHOLE) -> Conversation:
        """Decode a sample; see `datamodules.records.decode`.

        Raises:
            BadSample: The sample is damaged, or cannot be decoded.
            DataError: As for `members`.
            ServiceError: As for `members`.
        """
        entry, members = self.entries[number], self.members(number)
        with self.naming(number):
            return decode(members, key=entry.key, where=self._where(entry), bounds=bounds)

    @contextmanager
    def naming(self, number: int) -> Iterator[None]:
        """Make every `DataError` of what is done with a sample a `BadSample`."""
        entry = self.entries[number]
        try:
            yield
        except BadSample:
            raise
        except DataError as error:
            _, _, name = error.where.partition(f"{self._where(entry)}.")
            member, at = (name, entry.members[name].at) if name in entry.members else ("", entry.at)
            raise BadSample(
                error.what, shard=self.store.where(entry.shard), key=entry.key, member=member, offset=at,
                why=error.why, fix=error.fix,
            ) from error  # fmt: skip

    def _where(self, entry: Entry) -> str:
        return f"{self.store.where(entry.shard)}:{entry.key}"

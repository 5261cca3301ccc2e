"""Damaged tars: what has changed is named, what has not is served."""

import random
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from bernini.conversation import Conversation, Message
from bernini.errors import BadSample, DataError
from datamodules.index import INDEX
from datamodules.scanning import index_folder
from datamodules.shards import Shards, write_shards

TARS, SAMPLES = 500, 12
SHARD = "shard-000000.tar"
Members = list[tuple[tarfile.TarInfo, bytes]]


def rebuilt(whole: bytes, change: Callable[[Members], None]) -> bytes:
    """A tar whose list of members was changed."""
    with tarfile.open(fileobj=BytesIO(whole)) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    change(members)
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info, data in members:
            tar.addfile(info, BytesIO(data))
    return out.getvalue()


def one_bit(whole: bytes, rng: random.Random) -> bytes:
    data = bytearray(whole)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def twenty_bytes(whole: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(whole) - 20)
    return whole[:at] + rng.randbytes(20) + whole[at + 20 :]


def zeroed(whole: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(whole) - 4096)
    return whole[:at] + bytes(4096) + whole[at + 4096 :]


def truncated(whole: bytes, rng: random.Random) -> bytes:
    return whole[: rng.randrange(len(whole))]


def header_hit(whole: bytes, rng: random.Random) -> bytes:
    with tarfile.open(fileobj=BytesIO(whole)) as tar:
        at = rng.choice(tar.getmembers()).offset + rng.randrange(512)
    return whole[:at] + rng.randbytes(1) + whole[at + 1 :]


def duplicate(whole: bytes, rng: random.Random) -> bytes:
    return rebuilt(whole, lambda members: members.insert(at := rng.randrange(len(members)), members[at]))


def missing(whole: bytes, rng: random.Random) -> bytes:
    return rebuilt(whole, lambda members: members.pop(rng.randrange(len(members))) and None)


def gzipped(whole: bytes, rng: random.Random) -> bytes:
    import gzip

    return gzip.compress(whole, mtime=rng.randrange(1000))


def compressed_xz(whole: bytes, rng: random.Random) -> bytes:
    import lzma

    return lzma.compress(whole, preset=0) + bytes(rng.randrange(3))


def inserted(whole: bytes, rng: random.Random, **fields: object) -> bytes:
    """One more member, with a header of its own kind."""
    info = tarfile.TarInfo("extra.txt")
    for name, value in fields.items():
        setattr(info, name, value)
    return rebuilt(whole, lambda members: members.insert(rng.randrange(len(members)), (info, b"")))


def link(whole: bytes, rng: random.Random) -> bytes:
    kind = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
    return inserted(whole, rng, type=kind, linkname="/etc/passwd")


def sparse(whole: bytes, rng: random.Random) -> bytes:
    headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1", "GNU.sparse.size": "1"}
    return inserted(whole, rng, pax_headers=headers)


def outside(whole: bytes, rng: random.Random) -> bytes:
    return inserted(whole, rng, name=rng.choice(["../evil.txt", "/etc/evil.txt", "a/../../b.txt", "..\\evil.txt"]))


def giant(whole: bytes, rng: random.Random) -> bytes:
    """A header that claims 2 GB, or less than nothing."""
    with tarfile.open(fileobj=BytesIO(whole)) as tar:
        info = rng.choice(tar.getmembers())
    at, info.size = info.offset, rng.choice([2 << 30, 1 << 50, -512, -(1 << 40)])
    return whole[:at] + info.tobuf(tarfile.GNU_FORMAT) + whole[at + 512 :]


KINDS = [one_bit, twenty_bytes, zeroed, truncated, header_hit, duplicate, missing]
REFUSED = [gzipped, compressed_xz, link, sparse, outside, giant]  # kinds that a new index must never accept


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Shards:
    """Samples of a row and three more texts, 4 to 7 KiB each."""
    texts = [Conversation("t2v", [Message("text", text=f"{n} " * 800)], key=f"key-{n}") for n in range(SAMPLES)]
    folder = tmp_path_factory.mktemp("whole")
    write_shards(texts, folder)

    def add(members: Members) -> None:
        for at in range(len(members), 0, -1):
            key = members[at - 1][0].name.partition(".")[0]
            for name in ("c.txt", "b.txt", "a.txt"):
                data = f"{key} {name} ".encode() * 40
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                members.insert(at, (info, data))

    shard = folder / SHARD
    shard.write_bytes(rebuilt(shard.read_bytes(), add))
    (folder / INDEX).unlink()
    index_folder(folder)
    return Shards(folder)


def changed(original: bytes, damaged: bytes, shards: Shards) -> set[str]:
    """Samples of which a member is not at its place as it was."""
    return {
        entry.key
        for entry in shards.entries
        for m in entry.members.values()
        if original[m.at : m.at + m.size] != damaged[m.at : m.at + m.size]
    }


@pytest.mark.filterwarnings("ignore:.*bytes, the index says")
def test_damage_is_named_and_the_rest_is_served(whole: Shards, tmp_path: Path) -> None:
    shard, folder = tmp_path / SHARD, Path(whole.folder)
    original, index = (folder / SHARD).read_bytes(), (folder / INDEX).read_text()
    altered = served = 0
    for number in range(TARS):
        rng = random.Random(number)
        kind = (KINDS + REFUSED)[number % len(KINDS + REFUSED)]
        damaged, began = kind(original, rng), time.monotonic()
        shard.write_bytes(damaged)

        (tmp_path / INDEX).write_text(index)
        opened, bad = Shards(tmp_path), set()
        for at, entry in enumerate(opened.entries):
            try:
                assert opened.members(at) == whole.members(at)
            except BadSample as error:
                assert (error.shard, error.key) == (str(shard), entry.key) and error.offset and error.member
                bad.add(entry.key)
        assert bad == changed(original, damaged, whole), (number, kind)
        altered, served = altered + len(bad), served + SAMPLES - len(bad)

        (tmp_path / INDEX).unlink()
        try:
            again = index_folder(tmp_path)
        except DataError as error:
            assert SHARD in error.where and error.why + error.what and error.fix
        else:
            assert kind not in REFUSED, (number, kind)
            found = {entry.key for entry in again.shards[0].entries}
            assert found == {entry.key for entry in whole.entries} or kind is missing, (number, kind)
        assert time.monotonic() - began < 10
    assert altered and served


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (gzipped, "gzip"),
        (compressed_xz, "xz"),
        (link, "not a regular file"),
        (sparse, "sparse"),
        (outside, "up to the first dot"),
        (giant, "claims|bytes|read"),
        (duplicate, "twice"),
    ],
)
def test_what_is_refused_says_by_which_rule(whole: Shards, tmp_path: Path, kind, rule: str) -> None:
    (tmp_path / SHARD).write_bytes(kind((Path(whole.folder) / SHARD).read_bytes(), random.Random(1)))
    with pytest.raises(DataError, match=rule):
        index_folder(tmp_path)
    assert not (tmp_path / INDEX).exists()

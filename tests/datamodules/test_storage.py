"""Shards behind a URL: a local server that fails, hosts that must not be reached, and the cache."""

import multiprocessing
import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from factories import make_shards
from file_servers import FAULTS, FileServer, file_server
from filelock import FileLock

from bernini.errors import BadSample, ConfigError, DataError, ServiceError
from datamodules import VideoDataModule
from datamodules.cache import Cache
from datamodules.shards import Shards
from datamodules.storage import StorageConfig

SHARD = "shard-000000.tar"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "served", 6)


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with file_server(folder) as server:
        yield server


def storage(**options) -> StorageConfig:
    return StorageConfig(**{"allow_addresses": ["127.0.0.1"], "backoff": 0.001, "timeout": 5.0, **options})


def all_members(shards: Shards) -> list[dict[str, bytes]]:
    return [shards.members(number) for number in range(len(shards))]


def test_a_url_gives_what_the_folder_gives(server: FileServer, folder: Path) -> None:
    local, remote = Shards(folder), Shards(server.url, storage())
    assert remote.entries == local.entries and remote.fingerprint == local.fingerprint
    assert all_members(remote) == all_members(local)
    assert remote.read(3).prompt == local.read(3).prompt


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_read_urls_too(server: FileServer, folder: Path, start_method) -> None:
    kept: list[list[str]] = []
    for place, workers in ((str(folder), 0), (server.url, 1)):
        data = VideoDataModule(predict=place, workers=workers, start_method=start_method, storage=storage())
        data.setup("predict")
        data._clips["predict"].samples[0][0].members(0)  # connections of this process, which a fork must not use
        kept.append([sample.key for batch in data.predict_dataloader() for sample in batch.samples])
    assert kept[0] == kept[1] and len(kept[0]) == 6


def test_no_byte_is_wrong_and_no_sample_lost_on_a_bad_line(server: FileServer, folder, pytestconfig) -> None:
    whole, remote = all_members(Shards(folder)), Shards(server.url, storage(timeout=0.25, retries=10))
    server.share, server.stall = 0.2, 0.5
    numbers = random.Random(0)
    for _ in range(pytestconfig.getoption("reads")):
        number = numbers.randrange(len(whole))
        assert remote.members(number) == whole[number]
    assert set(server.faults) == set(FAULTS) and remote.store.retried > 0
    print(f"{sum(server.faults.values())} faults {dict(server.faults)}, {remote.store.retried} retries")


def test_a_broken_read_goes_on_where_it_broke_off(server: FileServer, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("datamodules.remote.PIECE", 1000)
    remote = Shards(server.url, storage())
    remote.members(0)
    server.gets = 0
    assert remote.members(1) == Shards(folder).members(1)
    pieces = -(-remote.entries[1].span // 1000)
    assert server.gets == pieces
    server.share, server.gets = 0.5, 0
    server.random.seed(1)
    assert remote.members(1) == Shards(folder).members(1) and server.gets > pieces


def test_a_service_that_stays_away_is_named(server: FileServer) -> None:
    remote = Shards(server.url, storage(retries=2))
    server.status = 503
    with pytest.raises(ServiceError, match="no answer in 3 tries") as error:
        remote.members(0)
    assert f"{server.url}/{SHARD}" in str(error.value) and "storage.retries" in error.value.fix
    assert remote.store.retried == 2
    server.status = 403
    with pytest.raises(ServiceError, match="refuses"):
        remote.members(0)
    assert remote.store.retried == 2, "what is forbidden is not asked for again"
    server.status = 404
    with pytest.raises(DataError, match="no such file"):
        remote.members(0)


def test_a_shard_that_changes_is_a_hard_error(server: FileServer, folder: Path) -> None:
    remote, shard = Shards(server.url, storage()), folder / SHARD
    entry, data = remote.entries[2], shard.read_bytes()
    remote.members(0)
    shard.write_bytes(data[: entry.at + 600] + b"\0" + data[entry.at + 601 :])
    with pytest.raises(BadSample, match="not those that were indexed") as bad:
        remote.members(2)
    assert (bad.value.shard, bad.value.key, bad.value.member) == (f"{server.url}/{SHARD}", entry.key, "json")
    server.tag = '"2"'
    with pytest.raises(DataError, match="not the one that was indexed") as error:
        remote.members(2)
    assert not isinstance(error.value, BadSample) and '"1" and is "2"' in error.value.why
    shard.write_bytes(data[:3000])
    with pytest.raises(DataError, match="not the one that was indexed") as error:
        remote.members(5)
    assert "it has 3000 bytes" in error.value.why
    with pytest.raises(DataError, match="not the one that was indexed"):
        Shards(server.url, storage()).members(0)


def test_redirects_to_where_the_bytes_lie_are_followed(server: FileServer, folder: Path, tmp_path: Path) -> None:
    with file_server(tmp_path) as front:
        front.redirect = f"{server.url}/{{name}}?signature=x"
        assert all_members(Shards(front.url, storage())) == all_members(Shards(folder))


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[fe80::1]/x",
        "http://127.0.0.2:{port}/data/index.jsonl",
        "http://localtest/data/index.jsonl",
    ],
)
def test_redirects_to_private_addresses_are_refused(server: FileServer, target: str, monkeypatch) -> None:
    server.redirect = target.format(port=server.server_port)
    resolve_to(monkeypatch, "10.1.2.3")
    with pytest.raises(ConfigError, match="public addresses only") as error:
        Shards(server.url, storage())
    assert "storage.allow_addresses" in error.value.fix


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", ""),
        ("localhost", ""),
        ("[::1]", ""),
        ("[::ffff:127.0.0.1]", ""),
        ("[64:ff9b::7f00:1]", ""),
        ("2130706433", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("metadata", "169.254.169.254"),
        ("intranet", "192.168.0.7"),
        ("carrier", "100.64.0.1"),
        ("anywhere", "0.0.0.0"),
        ("many", "224.0.0.1"),
    ],
)
def test_private_hosts_are_refused_by_number_and_by_name(server: FileServer, host, address, monkeypatch) -> None:
    if address:
        resolve_to(monkeypatch, address)
    with pytest.raises(ConfigError, match=r"public addresses only|whole URLs only"):
        Shards(f"http://{host}:{server.server_port}/data", StorageConfig(backoff=0.001))
    assert server.gets == 0


def resolve_to(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Have every name lead to one address, as the name servers of others may."""
    real = socket.getaddrinfo

    def resolved(host, *rest, **options):
        numeric = (host.replace(".", "").isdigit() and "." in host) or ":" in host
        return real(host if numeric else address, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)


def test_a_driver_that_is_missing_is_named(monkeypatch) -> None:
    for scheme, module in (("s3", "s3fs"), ("gs", "gcsfs")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match="not installed") as error:
            Shards(f"{scheme}://bucket/folder")
        assert f"bernini[{scheme}]" in error.value.fix


def test_what_was_read_once_is_kept(server: FileServer, folder: Path, tmp_path: Path) -> None:
    options = storage(cache=str(tmp_path / "cache"))
    first = all_members(Shards(server.url, options))
    server.gets = 0
    again = Shards(server.url, options)
    assert all_members(again) == first and server.gets == 1, "the index alone"
    for path in (tmp_path / "cache").glob("??/*"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert all_members(again) == first and server.gets == 1 + len(first), "damaged files are fetched anew"
    server.status = 503
    assert all_members(again) == first


def test_the_cache_keeps_its_limit_and_what_was_used_last(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    names = [f"{number:032x}"[::-1] for number in range(10)]
    for number, name in enumerate(names[:9]):
        cache.put(name, bytes(100))
        os.utime(tmp_path / name[:2] / name, (number, number))
    assert cache.get(names[0]) == bytes(100) and cache.get("f" * 32) is None
    cache.put(names[9], bytes(300))
    left = [name for name in names if cache.get(name) is not None]
    assert names[0] in left and names[9] in left and names[1] not in left
    assert held(tmp_path) <= 1000
    cache.put("e" * 32, bytes(1001))
    assert cache.get("e" * 32) is None


def held(folder: Path) -> int:
    with FileLock(folder / ".lock"):  # between two writes
        return sum(path.stat().st_size for path in folder.glob("??/*"))


def fill(folder: Path, seed: int, highest) -> None:
    cache, rng = Cache(folder, 20_000), random.Random(seed)
    for _ in range(60):
        name = f"{rng.randrange(40):032x}"[::-1]
        data = cache.get(name)
        assert data in (None, name.encode() * 50)
        if data is None:
            cache.put(name, name.encode() * 50)
        highest.value = max(highest.value, held(folder))


def test_many_processes_share_a_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    highest = context.Value("l", 0)
    workers = [context.Process(target=fill, args=(tmp_path, seed, highest)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert 10_000 < highest.value <= 20_000 and not list(tmp_path.glob("*.tmp"))


def test_options_out_of_range() -> None:
    for options in ({"cache_gb": 0}, {"retries": -1}, {"timeout": 0}, {"allow_addresses": ["host"]}):
        with pytest.raises(ConfigError):
            StorageConfig(**options)

"""What is never run, opened or unpickled: each case would write a canary if it were."""

import json
import os
import pickle
import tarfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import make_shards

from bernini.errors import BadSample, BerniniError, ConfigError, DataError
from datamodules import VideoDataModule
from datamodules.index import INDEX, index_text, parse_index
from datamodules.scanning import index_folder
from datamodules.shards import Shards
from datamodules.storage import StorageConfig

SHARD = "shard-000000.tar"


class Evil:
    """Makes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that must not come into being, not even a moment later."""
    yield tmp_path / "canary"
    time.sleep(0.02)
    assert not (tmp_path / "canary").exists()


def payloads(canary: Path) -> dict[str, bytes]:
    """Files that run a command when they are loaded by the loaders that ask no questions."""
    evil = Evil(canary)
    torch_file, numpy_file = BytesIO(), BytesIO()
    torch.save(evil, torch_file)
    np.savez(numpy_file, a=np.array([evil], dtype=object))
    return {"pickle": pickle.dumps(evil), "torch": torch_file.getvalue(), "numpy": numpy_file.getvalue()}


def test_the_canary_would_sing(tmp_path: Path) -> None:
    for name, load in {
        "pickle": lambda file: pickle.load(file),
        "torch": lambda file: torch.load(file, weights_only=False),
        "numpy": lambda file: np.load(file, allow_pickle=True)["a"],
    }.items():
        load(BytesIO(payloads(tmp_path / name)[name]))
        assert (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("location", "rule"),
    [
        ("pipe:touch {canary}", "no commands"),
        ("PIPE:touch {canary}", "no commands"),
        ("touch {canary} |", "no commands"),
        ("http://host/a.tar::pipe:touch {canary}", "no chains"),
        ("simplecache::s3://bucket/x", "no chains"),
        ("zip://x::/tmp/a.zip", "no chains"),
        ("pipe:touch {canary}; echo {{0..3}}", "no commands"),
        ("/data/{{pipe:touch {canary},a}}", "no patterns"),
        ("/data/shard-{{000..003}}.tar", "no patterns"),
        ("/data/a\ntouch {canary}", "no patterns"),
        ("file:///etc", "no file URLs"),
        ("file:/etc/passwd", "no file URLs"),
        ("ssh://host/x", "known schemes only"),
        ("hf://datasets/a/b", "known schemes only"),
        ("memory://x", "known schemes only"),
        ("data:text/plain,x", "known schemes only"),
        ("http:///x", "known schemes only"),
        ("http://[x/y", "whole URLs only"),
        ("https://user:password@host/x", "no secrets in URLs"),
        ("https://host/x?X-Amz-Signature=password", "no secrets in URLs"),
        ("http://169.254.169.254/latest", "public addresses only"),
        ("http://127.0.0.1:1/x", "public addresses only"),
    ],
)
def test_locations(location: str, rule: str, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f"/data=pipe:touch {canary}")
    given = location.format(canary=canary)
    config = StorageConfig(retries=0)
    data = VideoDataModule(train=[given], storage=config)  # a list of folders, as in a configuration
    for use in (lambda: Shards(given, config), lambda: data.setup("fit")):
        with pytest.raises(ConfigError, match="not allowed") as error:
            use()
        assert f"`{rule}`" in error.value.why and error.value.fix
        assert "password" not in str(error.value)


def test_the_environment_rewrites_nothing(canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards(tmp_path / "shards", 2)
    monkeypatch.setenv("GOPEN_REWRITE", f"{folder}=pipe:touch {canary};")
    assert len(Shards(folder).members(0)) >= 2


def with_member(tmp_path: Path, name: str, data: bytes = b"", **fields: object) -> Path:
    """A folder without an index whose shard has one more member."""
    folder = make_shards(tmp_path / "shards", 2)
    (folder / INDEX).unlink()
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    with tarfile.open(folder / SHARD, "a") as tar:
        tar.addfile(info, BytesIO(data))
    return folder


@pytest.mark.parametrize(
    "name", ["pyd", "pkl", "pickle", "pth", "pt", "npz", "npy", "py", "sh", "so", "PKL", "a.b.json"]
)
@pytest.mark.parametrize("kind", ["pickle", "torch", "numpy"])
def test_suffixes_that_hold_code(name: str, kind: str, canary: Path, tmp_path: Path) -> None:
    folder = with_member(tmp_path, f"key.{name}", payloads(canary)[kind])
    with pytest.raises(DataError, match="its suffix") as error:
        index_folder(folder)
    assert f"key.{name}" in error.value.where and error.value.fix


@pytest.mark.parametrize("suffix", ["json", "mp4", "png", "prepared.safetensors"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "numpy"])
def test_code_under_a_good_suffix(suffix: str, kind: str, canary: Path, tmp_path: Path) -> None:
    """Through every decoder: the file is refused as what it claims to be."""
    row = {"schema": 1, "task": "t2v", "inputs": [], "visuals": [], "videos": [], "images": []}
    members = {"json": json.dumps(row).encode(), suffix: payloads(canary)[kind]}
    if suffix != "json":
        kinds = {"mp4": ("v0.mp4", "video"), "png": ("i0.png", "image")}
        name, message = kinds.get(suffix, ("posterior.0", "video"))
        stored = {"pixels": name} if suffix in kinds else {"posterior": name}
        row["visuals"] = [{"fps": 8.0, "source": {}, **stored}]
        row["inputs"] = [{"type": message, "has_loss": 0}, {"type": "text", "has_loss": 0, "text": "x"}]
        members = {"json": json.dumps(row).encode(), name if suffix in kinds else suffix: payloads(canary)[kind]}
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / SHARD, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"key.{name}")
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    with pytest.raises(DataError) as error:
        index_folder(folder)
        Shards(folder).read(0)
    assert f"{SHARD}:key" in error.value.where


@pytest.mark.parametrize(
    ("name", "fields", "rule"),
    [
        ("../../x.txt", {}, "up to the first dot"),
        ("/etc/cron.txt", {}, "up to the first dot"),
        ("a/../b.txt", {}, "up to the first dot"),
        ("clip v1.txt", {}, "up to the first dot"),
        ("clip_v1.2.txt", {}, "its suffix"),
        ("clip.a.b.txt", {}, "its suffix"),
        ("x.txt", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "symbolic link"),
        ("x.txt", {"type": tarfile.LNKTYPE, "linkname": "v2v-0000.json"}, "hard link"),
        ("x.txt", {"type": tarfile.FIFOTYPE}, "device or pipe"),
        ("x.txt", {"type": tarfile.CHRTYPE}, "device or pipe"),
        ("x.txt", {"type": tarfile.DIRTYPE}, "directory"),
        ("v2v-0000.x.txt", {}, "lie between"),
    ],
)
def test_members(name: str, fields: dict, rule: str, canary: Path, tmp_path: Path) -> None:
    folder = with_member(tmp_path, name, **fields)
    with pytest.raises(DataError, match=rule) as error:
        index_folder(folder)
    assert name in error.value.where and error.value.fix


def test_members_above_their_limit(tmp_path: Path) -> None:
    folder = with_member(tmp_path, "key.txt", bytes((1 << 20) + 1))
    with pytest.raises(DataError, match="1048577 bytes, txt members may have 1048576"):
        index_folder(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text, canary: text.replace(SHARD, f"pipe:touch {canary}"), "not allowed"),
        (lambda text, canary: text.replace(SHARD, "../other.tar"), "not allowed"),
        (lambda text, canary: text.replace(SHARD, "/etc/passwd"), "not allowed"),
        (lambda text, canary: text.replace(SHARD, "http:x.tar"), "not allowed"),
        (lambda text, canary: text.replace("v2v-0000", "../x"), "not those that were written"),
        (lambda text, canary: text.replace('"index": 2', '"index": 1'), "version 1 instead of 2"),
        (lambda text, canary: text.replace('"samples": 2', '"samples": 2, "x": ' + "[" * 5000), "cannot be read"),
        (lambda text, canary: "".join(text.splitlines(keepends=True)[:1]), "lines are missing"),
        (lambda text, canary: text[:-30], "not those that were written"),
        (lambda text, canary: "", "version None"),
        (lambda text, canary: pickle.dumps(Evil(canary)).decode("latin1"), "cannot be read"),
    ],
)
def test_an_index_that_was_tampered_with(change: Callable, why: str, canary: Path, tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "shards", 2)
    (folder / INDEX).write_text(change((folder / INDEX).read_text(), canary))
    with pytest.raises(DataError, match=why) as error:
        Shards(folder)
    assert f"{INDEX}, line " in error.value.where and error.value.fix


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"key": "../../x"}, "the key"),
        ({"span": 1 << 60}, "spans"),
        ({"at": -512}, "no number"),
        ({"members": {}}, "no members"),
        ({"members": {"x.mp4": {"at": 512, "size": 1, "xxh3": "", "video": {"codec": "h264"}}}}, "'width'"),
        ({"members": {"x.pkl": {"at": 512, "size": 1, "xxh3": ""}}}, "its suffix"),
        ({"members": {"x.txt": {"at": 512, "size": 1 << 40, "xxh3": ""}}}, "bytes, txt members"),
        ({"members": {"x.txt": {"at": 40000, "size": 100, "xxh3": ""}}}, "outside its sample"),
    ],
)
def test_an_index_that_was_forged(change: dict, why: str, tmp_path: Path) -> None:
    """Whoever writes an index with good hashes gets no further than the rules."""
    from datamodules import index

    folder = make_shards(tmp_path / "shards", 2)
    lines = (folder / INDEX).read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), **change})
    head = json.loads(lines[1])
    lines[1] = index._head(head["shard"], head["bytes"], head["sha256"], lines[2:])
    lines[0] = json.dumps({**json.loads(lines[0]), "fingerprint": index._fingerprint(lines[1:2])})
    with pytest.raises(DataError, match=why):
        parse_index("\n".join(lines), "index")


def test_links_lead_nowhere_unless_allowed(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "shards", 2)
    whole = Shards(folder).members(0)
    (folder / SHARD).rename(tmp_path / "elsewhere.tar")
    (folder / SHARD).symlink_to(tmp_path / "elsewhere.tar")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / SHARD).symlink_to(tmp_path / "elsewhere.tar")
    for use in (lambda: Shards(folder), lambda: index_folder(tmp_path / "linked")):
        with pytest.raises(ConfigError, match="symbolic link") as error:
            use()
        assert "no links" in error.value.why and "storage.allow_links" in error.value.fix
    assert Shards(folder, StorageConfig(allow_links=True)).members(0) == whole
    index_folder(tmp_path / "linked", allow_links=True)


def test_a_pipe_in_place_of_a_shard_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SHARD)
    with pytest.raises(DataError, match="not a regular file"):
        index_folder(tmp_path)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "A.TAR.BZ2"])
def test_compressed_tars_are_not_left_out_silently(name: str, tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "shards", 2)
    (folder / name).touch()
    with pytest.raises(DataError, match="compressed"):
        Shards(folder)


def test_a_row_cannot_name_files(tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    folder = make_shards(tmp_path / "shards", 1)
    shard = folder / SHARD
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"pixels": "v0.mp4"', b'"pixels": "../s.x"'))
    (folder / INDEX).unlink()
    with pytest.raises(DataError, match=r"\.\./s\.x of the sample is missing"):
        index_folder(folder)


def test_errors_of_samples_cross_processes() -> None:
    error = BadSample("what", shard="s.tar", key="k", member="json", offset=7, why="why", fix="fix")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.where == "s.tar:k.json" and isinstance(again, BerniniError)
    assert (again.shard, again.key, again.member, again.offset) == ("s.tar", "k", "json", 7)


def test_the_text_of_an_index_is_a_function_of_the_data(tmp_path: Path) -> None:
    text = (make_shards(tmp_path, 3) / INDEX).read_text()
    index = parse_index(text, "")
    assert index_text(index.shards) == text and parse_index(index_text(index.shards[::-1]), "") == index

"""`bernini data index` over tars that others wrote, and shards that others read."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from factories import fit, make_config, make_shards
from file_servers import file_server
from PIL import Image
from webdataset import TarWriter, WebDataset

from bernini.cli import main
from bernini.errors import DataError
from bernini.media import encode_video
from datamodules.index import INDEX, Video, parse_index
from datamodules.shards import Shards


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Two tars as somebody else's tool writes them, the second without one of its texts."""
    clip = encode_video(torch.zeros(3, 9, 32, 48).byte(), 24.0)
    for shard in range(2):
        with TarWriter(str(tmp_path / f"train-{shard:05d}.tar"), encoder=False) as tar:
            for number in range(3):
                sample = {"mp4": clip, "txt": b"a clip", "json": b'{"clip": [1, 2]}', "mask.jpg": picture()}
                if (shard, number) == (1, 2):
                    del sample["txt"]
                tar.write({"__key__": f"{shard}-{number:09d}", **sample})
    return tmp_path


def test_tars_of_others_are_indexed_as_they_are(foreign: Path, capsys) -> None:
    before = {path.name: path.read_bytes() for path in foreign.glob("*.tar")}
    assert main(["data", "index", str(foreign)]) == 0
    out = capsys.readouterr().out.splitlines()
    index = parse_index((foreign / INDEX).read_text(), "")
    assert out[0].startswith("6 samples in 2 shards, 0.1 MB, fingerprint " + index.fingerprint)
    assert [line.split(" x ") for line in out[1:]] == [
        ["       5", "json mask.jpg mp4 txt"],
        ["       1", "json mask.jpg mp4"],
    ]
    assert {path.name: path.read_bytes() for path in foreign.glob("*.tar")} == before
    for shard in index.shards:
        data = before[shard.name]
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        for entry in shard.entries:
            assert entry.at % 512 == 0
            for member in entry.members.values():
                assert member.xxh3 == xxhash.xxh3_128_hexdigest(data[member.at : member.at + member.size])
    assert index.shards[0].entries[0].members["mp4"].video == Video("h264", 48, 32, 9, 24.0)
    with pytest.raises(DataError, match="has no row"):
        Shards(foreign)


def test_members_that_every_sample_must_have(foreign: Path, capsys) -> None:
    assert main(["data", "index", str(foreign), "--require", "[mp4,txt]"]) == 77
    error = capsys.readouterr().err
    assert "txt of the sample is missing" in error and "train-00001.tar:1-000000002" in error
    assert not (foreign / INDEX).exists()


def test_an_index_is_not_made_over(foreign: Path, capsys) -> None:
    assert main(["data", "index", str(foreign)]) == 0
    assert main(["data", "index", str(foreign)]) == 78
    assert "vouch" in capsys.readouterr().err
    assert main(["data", "indx", str(foreign)]) == 78
    assert "did you mean 'index'" in capsys.readouterr().err
    assert main(["data", "index", str(foreign), "--requir", "x"]) == 78
    assert main(["data"]) == 0
    assert "index " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_webdataset_reads_shards_with_an_index_beside_them(tmp_path: Path) -> None:
    ours = Shards(make_shards(tmp_path, 4))
    theirs = list(WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False))
    assert len(theirs) == 4
    for number, sample in enumerate(theirs):
        members = ours.members(number)
        assert sample["__key__"] == ours.entries[number].key
        assert {name: data for name, data in sample.items() if not name.startswith("__")} == members


def test_the_fingerprint_is_that_of_the_bytes(tmp_path: Path) -> None:
    prints = {name: Shards(make_shards(tmp_path / name, 4)).fingerprint for name in "ab"}
    assert prints["a"] == prints["b"]
    shard = tmp_path / "b" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    (tmp_path / "b" / INDEX).unlink()
    assert main(["data", "index", str(tmp_path / "b")]) == 0
    assert Shards(tmp_path / "b").fingerprint != prints["a"]


def test_fit_reads_from_a_url_through_a_cache(wan: Path, shards: Path, tmp_path: Path) -> None:
    local = make_config(wan, shards, tmp_path / "local")
    with file_server(shards) as server:
        remote = make_config(wan, Path("x"), tmp_path / "remote")
        remote["data"]["init_args"] |= {"train": server.url, "val": server.url, "predict": server.url}
        options = ["--data.storage.cache", str(tmp_path / "cache"), "--data.storage.allow_addresses", "[127.0.0.1]"]
        assert fit(remote, *options) == fit(local)
    assert list((tmp_path / "cache").glob("??/*"))


def test_json_of_others_is_not_taken_for_a_row(foreign: Path) -> None:
    main(["data", "index", str(foreign)])
    lines = [json.loads(line) for line in (foreign / INDEX).read_text().splitlines()]
    assert [line["task"] for line in lines if "key" in line] == [""] * 6

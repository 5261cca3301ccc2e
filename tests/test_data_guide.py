"""The commands of docs/data.md as they are written there, on tars and a server of the test's own."""

import importlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from factories import make_config, make_shards, write_config
from file_servers import file_server
from real_clips import write_pair
from webdataset import TarWriter

from bernini.cli import main
from bernini.media import encode_image, encode_video
from datamodules.index import MAX_SIZES
from datamodules.shards import Shards
from datamodules.storage import REMOTE, StorageConfig

MESSAGES = [{"type": "text", "text": "make it red"}, {"type": "video_gen", "has_loss": 1}]
GUIDE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()


def command(verb: str) -> list[str]:
    """The guide's command of one verb, without the program's name."""
    (found,) = (line for line in re.findall(r"^bernini (.+)$", GUIDE, re.M) if line.startswith(verb))
    return shlex.split(found)


def test_index_prints_what_the_guide_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tars").mkdir()
    clip = encode_video(torch.zeros(3, 5, 32, 32).byte(), 8.0)
    mask = encode_image(torch.zeros(3, 1, 8, 8).byte())
    for shard in range(2):
        with TarWriter(f"tars/{shard}.tar", encoder=False) as tar:
            for number in range(3):
                sample = {"mp4": clip, "json": b"{}", "mask.jpg": mask, "txt": b"x" * (5000 * (number < 2) + 1)}
                if (shard, number) == (1, 2):
                    del sample["txt"]
                tar.write({"__key__": f"{shard}{number}", **sample})
    assert main(command("data index")) == 0
    shown = re.search(r"```\n(\d+ samples in.+?)```", GUIDE, re.S)
    assert shown
    without = [re.sub("fingerprint .*", "", text) for text in (capsys.readouterr().out, shown[1])]
    assert without[0] == without[1]


def test_fit_reads_from_a_url(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "served")
    monkeypatch.chdir(tmp_path)
    config = make_config(wan, Path("none"), tmp_path / "run")
    with file_server(tmp_path / "served") as server:
        given = command("fit")
        given[given.index("-c") + 1] = write_config(tmp_path / "config.yaml", config)
        given[given.index("--data.train") + 1] = server.url
        more = ["--data.val", server.url, "--data.storage.allow_addresses", "[127.0.0.1]"]
        assert main([*given, *more]) == 0
    assert list(Path("cache").glob("??/*"))


def test_the_guide_names_every_option_scheme_and_suffix() -> None:
    options, schemes = StorageConfig.__dataclass_fields__, [f"{scheme}://" for scheme in REMOTE]
    for name in (*(f"`{name}`" for name in options), *schemes, *MAX_SIZES):
        assert name in GUIDE, name


@pytest.mark.parametrize("verb", ["prepare clips", "prepare /shared", "prepare --from-parquet"])
def test_prepare_makes_what_the_guide_says(
    verb: str, wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/Wan2.2").symlink_to(wan)
    given = [part.replace("/shared/", "") for part in command(verb)]
    if "--workers" in given:
        given[given.index("--workers") + 1] = "1"
    if "--from-parquet" in given:
        parquet = pytest.importorskip("pyarrow.parquet")
        file = io.BytesIO()
        torch.save(torch.zeros(1, 8, 2, 4, 4), file)
        row = {"inputs": json.dumps(MESSAGES), "images": [], "videos": [{"video_path": "a.mp4"}]}
        row |= {"source_name": "t2v$toy", "video_vae_latents": [file.getvalue()]}
        Path("rows").mkdir()
        parquet.write_table(importlib.import_module("pyarrow").Table.from_pylist([row]), "rows/part.parquet")
    else:
        write_pair(Path("clips"))
        given += ["--max-edge", "32", "--max-frames", "5"]
    if "--ray" in given:
        pytest.importorskip("ray")
    assert main(given) == 0
    sample = Shards("shards").read(0)
    assert all(media.posterior is not None and media.pixels is None for media in sample.media())
    assert bool(sample.text_features) == ("--text" in given)

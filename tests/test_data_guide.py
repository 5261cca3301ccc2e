"""The commands and the mix of docs/data.md as they are written there, with something tiny in the place of weights."""

import importlib
import io
import json
import re
import shlex
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml
from factories import logged_rows, make_config, make_shards, write_config
from file_servers import file_server
from real_clips import write_pair
from test_configs import BASE, tiny
from webdataset import TarWriter

from bernini.cli import main
from bernini.decoding import Limits
from bernini.lightning_cli import run_lightning
from bernini.media import encode_image, encode_video
from datamodules import VideoDataModule
from datamodules.index import MAX_SIZES
from datamodules.mixing import SourceConfig
from datamodules.packed_order import PackConfig
from datamodules.prepare import prepare
from datamodules.shards import Shards
from datamodules.storage import REMOTE, StorageConfig

MESSAGES = [{"type": "text", "text": "make it red"}, {"type": "video_gen", "has_loss": 1}]
ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", GUIDE, re.DOTALL)
LINES = [line.partition("  #")[0] for kind, block in BLOCKS if not kind for line in block.splitlines()]
COMMANDS = [shlex.split(line)[1:] for line in LINES if line.startswith("bernini ")]
FITS = [words for words in COMMANDS if words[:3] == ["fit", "-c", str(BASE.relative_to(ROOT))]]
(INDEX,) = [words for words in COMMANDS if words[:2] == ["data", "index"]]
(RAY,) = [words for words in COMMANDS if "--ray" in words]  # tests/datamodules/test_preparing.py
PREPARES = [words for words in COMMANDS if words[0] == "prepare" and words != RAY]
(PACKS,) = [words for words in COMMANDS if "configs/data/packs.yaml" in words]
(URL,) = [words for words in COMMANDS if "https://example.org/shards" in words]


def test_every_command_is_run_here() -> None:
    assert len(FITS) >= 4 and len(PREPARES) >= 2
    looking = [words for words in COMMANDS if words[0] == "data" and words != INDEX]  # tests/test_looking_guide.py
    assert [words for words in COMMANDS if words not in [*FITS, *PREPARES, *looking]] == [INDEX, URL, RAY]


@pytest.mark.parametrize("words", FITS, ids=" ".join)
def test_command_is_built(words: list[str], wan: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = words[:-2] if words[-2:] == ["--ckpt_path", "auto"] else words
    small = [word for word in tiny(BASE, wan, shards) if not word.startswith(("--data.train", "--data.batch_size"))]
    cli = run_lightning([*words[1:], *small], run=False)
    if any("mix_" in word for word in words):
        weights = {name: source.weight for name, source in cli.datamodule.folders["train"].items()}
        assert weights["video_pairs"] == {0: 11, 1000000: 0}
        assert weights["t2i"] == (20 if "--data.train.t2i.weight" in words else 31)


def test_packs_are_trained_on(wan: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in PACKS]
    small = ["--data.pack.tokens=24"] + [
        word for word in tiny(BASE, wan, shards) if not word.startswith("--data.batch_size")
    ]
    assert main([*words, *small, "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]) == 0
    rows = logged_rows(tmp_path, "data")
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["data/tokens"] <= 24 and row["data/padding"] == 1 - row["data/tokens"] / 24
        assert row["data/cost_spread"] == 0, "of one rank"


def test_mix_is_a_configuration(wan: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mix,) = [block for kind, block in BLOCKS if kind == "yaml"]
    (tmp_path / "mix.yaml").write_text(mix)
    monkeypatch.chdir(ROOT)
    small = [word for word in tiny(BASE, wan, shards) if not word.startswith("--data.train")]
    cli = run_lightning(["-c", str(BASE), "-c", str(tmp_path / "mix.yaml"), *small], run=False)
    given = yaml.safe_load(mix)["data"]["init_args"]["train"]
    assert cli.datamodule.folders["train"] == {name: SourceConfig(**source) for name, source in given.items()}


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
    assert main(INDEX) == 0
    shown = re.search(r"```\n(\d+ samples in.+?)```", GUIDE, re.S)
    assert shown
    without = [re.sub("fingerprint .*", "", text) for text in (capsys.readouterr().out, shown[1])]
    assert without[0] == without[1]


def test_fit_reads_from_a_url(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "served")
    monkeypatch.chdir(tmp_path)
    config = make_config(wan, Path("none"), tmp_path / "run")
    with file_server(tmp_path / "served") as server:
        given = list(URL)
        given[given.index("-c") + 1] = write_config(tmp_path / "config.yaml", config)
        given[given.index("--data.train") + 1] = server.url
        more = ["--data.val", server.url, "--data.storage.allow_addresses", "[127.0.0.1]"]
        assert main([*given, *more]) == 0
    assert list(Path("cache").glob("??/*"))


def test_the_guide_names_every_option_scheme_and_suffix() -> None:
    options, schemes = StorageConfig.__dataclass_fields__, [f"{scheme}://" for scheme in REMOTE]
    for name in (*(f"`{name}`" for name in options), *schemes, *MAX_SIZES):
        assert name in GUIDE, name
    limits = [f"limits.{field.name}" for field in fields(Limits)]
    for name in (*limits, *(f"pack.{field.name}" for field in fields(PackConfig))):
        assert name in GUIDE, name
    _, module, command = re.split(r"^Of `.+`:$", GUIDE.partition("## Options\n")[2].partition("\n## ")[0], flags=re.M)
    for table, function, given in (
        (module, VideoDataModule.__init__, {"self"}),
        (command, prepare, {"input", "output"}),
    ):
        listed = [name for row in re.findall(r"^\| (`.+?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)]
        assert sorted(listed) == sorted(signature(function).parameters.keys() - given)


@pytest.mark.parametrize("words", PREPARES, ids=" ".join)
def test_prepare_makes_what_the_guide_says(
    words: list[str], wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/Wan2.2").symlink_to(wan)
    given = list(words)
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
    assert main(given) == 0
    sample = Shards("shards").read(0)
    assert all(media.posterior is not None and media.pixels is None for media in sample.media())
    assert bool(sample.text_features) == ("--text" in given)

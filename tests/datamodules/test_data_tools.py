"""`bernini data info`, `stats` and `preview` over toy shards, features and real clips."""

import base64
import csv
import io
import json
import re
from pathlib import Path

import av
import pytest
import torch
from factories import make_clip, make_conversation, make_shards, make_wan_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from real_clips import write_pair
from webdataset import TarWriter

from bernini.cli import main
from bernini.conversation import Conversation, Media, Message
from bernini.media import encode_video
from bernini.planner.vision import VisionConfig, Visual
from datamodules.scanning import index_folder
from datamodules.shards import Shards, write_shards
from datamodules.tools.preview import TEXT, THUMB, choose
from datamodules.tools.stats import ASPECTS, aspect
from datamodules.toyworld.shards import write_toy_shards


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The carphone pair as raw shards."""
    folder = tmp_path_factory.mktemp("real")
    write_pair(folder / "clips")
    assert main(["prepare", str(folder / "clips"), str(folder / "raw")]) == 0
    return folder / "raw"


@pytest.fixture(scope="module")
def latents(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of two sizes as posteriors and text features."""
    folder = tmp_path_factory.mktemp("latents")
    write_toy_shards(folder, ["v2v", "i2v"], 4, frames=5, height=32, width=64, vae=str(wan), text=str(wan))
    return folder


def seen(folder: Path) -> Path:
    """A sample of which only what a vision tower made is stored."""
    config = VisionConfig()
    visual = Visual(torch.empty(0, config.columns), (2, 4, 6), True, config, torch.zeros(12, 8), "0" * 16)
    messages = [Message("text", text="look"), Message("video_gen", media=Media(visual=visual, fps=16.0))]
    write_shards([Conversation("t2v", messages, key="seen")], folder)
    return folder


def printed(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert main(["data", *map(str, args)]) == 0
    return capsys.readouterr().out


def test_info_of_raw_and_prepared_shards(latents: Path, tmp_path: Path, capsys) -> None:
    make_shards(tmp_path / "raw", 5)
    raw, features, vision = json.loads(
        printed(capsys, "info", tmp_path / "raw", latents, seen(tmp_path / "s"), "--json")
    )
    size = sum(path.stat().st_size for path in (tmp_path / "raw").glob("*.tar"))
    assert raw == {
        "folder": str(tmp_path / "raw"), "samples": 5, "shards": 1, "bytes": size, "tasks": {"v2v": 3, "t2v": 2},
        "columns": {"pixels": 5}, "fingerprint": Shards(tmp_path / "raw").fingerprint, "index": 2,
    }  # fmt: skip
    assert features["columns"] == {"posterior": 4, "text": 4} and vision["columns"] == {"vit": 1}
    assert main(["data", "info", str(tmp_path)]) == 78
    assert "no shards here" in capsys.readouterr().err


def test_info_of_tars_of_others(tmp_path: Path, capsys) -> None:
    with TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "a", "mp4": encode_video(torch.zeros(3, 5, 32, 32).byte(), 8.0), "txt": b"x"})
        tar.write({"__key__": "b", "txt": b"x"})
    index_folder(tmp_path)
    (found,) = json.loads(printed(capsys, "info", tmp_path, "--json"))
    assert found["columns"] == {"txt": 2, "mp4": 1} and found["tasks"] == {}
    assert main(["data", "stats", str(tmp_path)]) == 77
    assert "was not written by `bernini prepare`" in capsys.readouterr().err


def test_stats_count_what_is_there(tmp_path: Path, capsys) -> None:
    samples = [make_conversation(number, task) for number, task in enumerate(["v2v", "rv2v", "v2v", "t2i"])]
    (target,) = samples[2].targets
    target.media = make_clip(9, frames=9, height=32, width=48)
    shards = write_shards(samples, tmp_path)
    v2v, rv2v, t2i = json.loads(printed(capsys, "stats", tmp_path, "--json"))
    assert v2v == {
        "folder": str(tmp_path), "task": "v2v", "samples": 2, "bytes": sum(shards.entries[n].span for n in (0, 2)),
        "seconds": 1.75, "frames": {"5": 1, "9": 1}, "fps": {"8.0": 2}, "words": {"3": 2}, "sources": {"1": 2},
        "sizes": {"32x32": 1, "48x32": 1}, "aspects": {"1:1": 1, "3:2": 1},
    }  # fmt: skip
    assert (rv2v["sources"], t2i["seconds"], t2i["frames"], t2i["fps"]) == ({"2": 1}, 0.0, {"1": 1}, {})
    rows = list(csv.DictReader(io.StringIO(printed(capsys, "stats", tmp_path, "--csv"))))
    assert [row["task"] for row in rows] == ["v2v", "rv2v", "t2i"]
    assert [rows[0][f"frames_{name}"] for name in ("min", "median", "max")] == ["5", "5", "9"]
    assert main(["data", "stats", str(tmp_path), "--csv", "--json"]) == 78


def test_stats_of_folders_and_of_samples_without_targets(tmp_path: Path, capsys) -> None:
    make_shards(tmp_path / "a", 2)
    one = make_conversation(0)
    one.messages = [message for message in one.messages if not message.is_target]
    write_shards([one], tmp_path / "b")
    lines = printed(capsys, "stats", tmp_path / "a", tmp_path / "b").splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["folder", "task"], [str(tmp_path / "a"), "v2v"], [str(tmp_path / "a"), "t2v"], [str(tmp_path / "b"), "v2v"],
    ]  # fmt: skip
    assert lines[3].split()[3:5] == ["0.6", "5"]
    assert lines[5].split()[:2] == ["1:1", "3"] and lines[5].endswith("32x32")


def test_features_have_the_size_of_what_they_were_made_of(latents: Path, tmp_path: Path, capsys) -> None:
    v2v, i2v = json.loads(printed(capsys, "stats", latents, "--json"))
    for row in (v2v, i2v):
        assert (row["frames"], row["sizes"], row["aspects"]) == ({"5": 2}, {"64x32": 2}, {"2:1": 2})
    (row,) = json.loads(printed(capsys, "stats", seen(tmp_path), "--json"))
    assert (row["frames"], row["fps"], row["sizes"]) == ({"4": 1}, {"2.0": 1}, {"84x56": 1})


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_the_aspect_of_a_turned_frame_is_turned(width: int, height: int) -> None:
    name = aspect(width, height)
    assert aspect(height, width) == ":".join(reversed(name.split(":")))
    assert aspect(*map(int, name.split(":"))) == name and list(ASPECTS.values()) == sorted(ASPECTS.values())


def embedded(page: Path, kind: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(rf'src="data:{kind};base64,([^"]+)"', page.read_text())]


def test_preview_of_real_clips(real: Path, tmp_path: Path, capsys) -> None:
    out = printed(capsys, "preview", real, "--out", tmp_path)
    assert out == f"sheet: {tmp_path / 'sheet.png'}\npage:  {tmp_path / 'preview.html'}\n"
    clips = embedded(tmp_path / "preview.html", "video/mp4")
    assert len(clips) == 2
    original = Shards(real).read(0)
    for data, message in zip(clips, original.visual, strict=True):
        assert message.media and message.media.pixels is not None
        with av.open(io.BytesIO(data)) as container:
            assert (container.streams.video[0].codec.name, container.streams.video[0].pix_fmt) == ("h264", "yuv420p")
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        shown = torch.stack([torch.from_numpy(frame) for frame in frames]).permute(3, 0, 1, 2)
        assert shown.shape == message.media.pixels.shape
        assert (shown.float() - message.media.pixels.float()).abs().mean() < 4
    page = (tmp_path / "preview.html").read_text()
    for text in ("v2v · carphone", "remove the compression artefacts", "176x144, 65 frames, 16 fps", "source 1"):
        assert text in page
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > THUMB
        corner = torch.tensor(sheet.crop((TEXT, 40, TEXT + 400, 100)).getextrema()).float()
    assert (corner[:, 1] - corner[:, 0] > 100).all()  # there is a picture


def test_preview_shows_clips_without_loss_and_odd_edges(tmp_path: Path, capsys) -> None:
    one = make_conversation(0, "rv2v")
    one.messages[0].media = make_clip(0, height=33, width=600)
    write_shards([one], tmp_path / "s", lossless=True)
    printed(capsys, "preview", tmp_path / "s", "--out", tmp_path, "--max-edge", "100")
    assert len(embedded(tmp_path / "preview.html", "image/png")) == 1
    for data, edges in zip(embedded(tmp_path / "preview.html", "video/mp4"), [(100, 6), (32, 32)], strict=True):
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height, stream.pix_fmt) == (*edges, "yuv420p")


def test_preview_of_features(wan: Path, latents: Path, tmp_path: Path, capsys) -> None:
    printed(capsys, "preview", latents, "--out", tmp_path, "--count", 3)
    page = (tmp_path / "preview.html").read_text()
    assert page.count("<article") == 3 and page.count("<video") == page.count("<img") == 0
    assert "F32 [8, 2, 4, 8]" in page and "text.text" in page
    printed(capsys, "preview", latents, "--out", tmp_path, "--count", 2, "--vae", wan)
    page = (tmp_path / "preview.html").read_text()
    assert (page.count("<video"), page.count("<img")) == (3, 1) and "source 1, decoded" in page
    printed(capsys, "preview", seen(tmp_path / "s"), "--out", tmp_path)
    assert "F32 [12, 8]" in (tmp_path / "preview.html").read_text()


def test_samples_are_chosen_over_tasks_or_by_key(tmp_path: Path, capsys) -> None:
    write_shards((make_conversation(n, "t2v" if n == 7 else "v2v") for n in range(12)), tmp_path / "s")
    entries = Shards(tmp_path / "s").entries
    assert choose(entries, 4) == [0, 3, 7, 8] and choose(entries, 99) == list(range(12))
    printed(capsys, "preview", tmp_path / "s", "--out", tmp_path, "--samples", "[v2v-0011,v2v-0003]")
    assert re.findall(r"<h3>(.+)</h3>", (tmp_path / "preview.html").read_text()) == ["v2v · v2v-0011", "v2v · v2v-0003"]
    for wrong, why in ((("--samples", "[v2v-0012]"), "did you mean"), (("--count", "0"), "one sample or more")):
        assert main(["data", "preview", str(tmp_path / "s"), "--out", str(tmp_path), *wrong]) == 78
        assert why in capsys.readouterr().err

"""`bernini data lint`: every rule finds what breaks it, and nothing else."""

import copy
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import make_clip, make_conversation, make_shards
from file_servers import file_server
from hypothesis import given
from hypothesis import strategies as st
from real_clips import write_pair
from webdataset import TarWriter

from bernini.cli import main
from bernini.conversation import Conversation, Media, Message
from bernini.errors import DataError
from bernini.media import encode_video
from datamodules.index import INDEX, Index, Video, index_text, parse_index
from datamodules.records import encode, parse_row
from datamodules.scanning import index_folder
from datamodules.shards import write_shards
from datamodules.tools.folder import Folder, record
from datamodules.tools.lint import lint
from datamodules.tools.stats import Stats, as_csv, as_json, lines
from datamodules.toyworld.shards import write_toy_shards

SHARD = "shard-000000.tar"


def found(capsys: pytest.CaptureFixture[str], folder: Path | str, *options: str) -> list[tuple[str, str, str]]:
    """Key, member and rule of what `bernini data lint` names."""
    code = main(["data", "lint", str(folder), "--json", *options])
    rows = json.loads(capsys.readouterr().out)
    assert code == (1 if rows else 0) and all(row["what"] for row in rows)
    return [(row["key"], row["member"], row["rule"]) for row in rows]


def index_of(folder: Path) -> Index:
    return parse_index((folder / INDEX).read_text(), "")


def member_at(folder: Path, key: str, suffix: str) -> int:
    (member,) = (e.members[suffix] for s in index_of(folder).shards for e in s.entries if e.key == key)
    return member.at


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def sample(task: str = "v2v", prompt: str = "x", source: Media | None = None, target: Media | None = None):
    """One sample with a source clip and a target clip."""
    messages = [Message("video", media=source or make_clip(0)), Message("text", prompt)]
    return Conversation(task, [*messages, Message("video_gen", media=target or make_clip(1))], key="one")


def posterior(frames: int, fps: float = 8.0) -> Media:
    return Media(posterior=torch.zeros(8, frames, 4, 4), fps=fps)


def test_good_shards_pass(tmp_path: Path, capsys) -> None:
    tasks = ["t2i", "i2i", "t2v", "i2v", "v2v", "r2i", "r2v", "rv2v", "vi2v", "ads2v", "mv2v", "vrc2v"]
    write_toy_shards(tmp_path / "toy", tasks, 12, frames=5, height=32, width=32)
    without = [replace(one, messages=[m for m in one.messages if not m.is_target]) for one in (sample(),)]
    write_shards(without, tmp_path / "predicted")
    write_shards([sample(source=posterior(2), target=posterior(2))], tmp_path / "prepared")
    for folder in ("toy", "predicted", "prepared"):
        assert found(capsys, tmp_path / folder) == []
    assert main(["data", "lint", str(tmp_path / "toy")]) == 0
    assert capsys.readouterr().out == "12 samples in 1 shards, nothing is wrong\n"


def test_damage_is_named_where_it_is(tmp_path: Path, capsys) -> None:
    make_shards(tmp_path, 6)
    flip(tmp_path / SHARD, member_at(tmp_path, "t2v-0001", "v0.mp4") + 100)
    flip(tmp_path / SHARD, member_at(tmp_path, "v2v-0004", "json"))
    expected = [("t2v-0001", "v0.mp4", "hash"), ("v2v-0004", "json", "hash")]
    assert found(capsys, tmp_path) == expected
    assert main(["data", "lint", str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [[f"{SHARD}:{k}.{m}", rule] for k, m, rule in expected]
    assert "2 finding(s) in 6 samples: hash 2" in error and str(tmp_path) in error
    assert found(capsys, tmp_path, "--ignore", "[hash]") == []
    assert main(["data", "lint", str(tmp_path), "--ignore", "[hsh]"]) == 78
    assert "did you mean 'hash'" in capsys.readouterr().err


def test_a_bit_anywhere_is_found_where_it_is(tmp_path: Path) -> None:
    make_shards(tmp_path, 4)
    folder, path = Folder(tmp_path), tmp_path / SHARD
    spans = {(e.key, s): range(m.at, m.at + m.size) for e in folder.entries for s, m in e.members.items()}
    chosen, good = random.Random(0), path.read_bytes()
    places = [chosen.randrange(len(good)) for _ in range(20)] + [chosen.choice(span) for span in spans.values()]
    for at in places:
        flip(path, at)
        hit = [(key, suffix, "hash") for (key, suffix), span in spans.items() if at in span]
        assert [(f.key, f.member, f.rule) for f in lint(folder)] == (hit or [("", "", "shard")])
        path.write_bytes(good)


def test_a_shard_that_is_cut_short(tmp_path: Path, capsys) -> None:
    make_shards(tmp_path, 4)
    path = tmp_path / SHARD
    path.write_bytes(path.read_bytes()[: member_at(tmp_path, "t2v-0003", "v0.mp4") + 10])
    assert found(capsys, tmp_path) == [("", "", "shard"), ("t2v-0003", "v0.mp4", "cut")]


def test_shards_that_came_went_or_changed_between_members(tmp_path: Path, capsys) -> None:
    make_shards(tmp_path, 1)
    shutil.copy(tmp_path / SHARD, tmp_path / "more.tar")
    assert main(["data", "lint", str(tmp_path)]) == 1
    assert capsys.readouterr().out == f"more.tar: shard: it is not in {INDEX}\n"
    (tmp_path / "more.tar").unlink()
    flip(tmp_path / SHARD, 140)  # a time stamp in a header
    assert main(["data", "lint", str(tmp_path)]) == 1
    assert "headers or padding" in capsys.readouterr().out
    (tmp_path / SHARD).unlink()
    assert main(["data", "lint", str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith(f"{SHARD}: shard: the shard cannot be opened")


def test_a_key_in_two_shards(tmp_path: Path, capsys) -> None:
    make_shards(tmp_path, 2)
    with tarfile.open(tmp_path / SHARD) as whole, tarfile.open(tmp_path / "again.tar", "w") as copy:
        for header in whole:
            if header.name.startswith("v2v-0000."):
                copy.addfile(header, whole.extractfile(header))
    (tmp_path / INDEX).unlink()
    index_folder(tmp_path)
    assert found(capsys, tmp_path) == [("v2v-0000", "", "key")]


def test_what_the_index_says_of_a_clip(tmp_path: Path, capsys) -> None:
    make_shards(tmp_path, 2)
    index = index_of(tmp_path)
    entry = index.shards[0].entries[0]
    member = entry.members["v0.mp4"]
    assert member.video
    entry.members["v0.mp4"] = replace(member, video=replace(member.video, frames=9))
    (tmp_path / INDEX).write_text(index_text(index.shards))
    assert found(capsys, tmp_path) == [("v2v-0000", "v0.mp4", "index")]


def indexed(folder: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A shard with one sample whose members were changed before it was indexed."""
    members = encode(make_conversation(0, "rv2v"))
    change(members)
    with TarWriter(str(folder / SHARD), encoder=False) as tar:
        tar.write({"__key__": "one", **members})
    index_folder(folder)
    return folder


def spoil(suffix: str, at: float) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        data = bytearray(members[suffix])
        start = int(at * len(data)) if suffix != "v2.mp4" else data.index(b"mdat") + 4 + 700
        data[start : start + 40] = bytes(40)
        members[suffix] = bytes(data)

    return change


@pytest.mark.parametrize("suffix", ["i1.png", "v2.mp4"])
def test_what_was_damaged_before_it_was_indexed(suffix: str, tmp_path: Path, capsys) -> None:
    assert found(capsys, indexed(tmp_path, spoil(suffix, 0.6))) == [("one", suffix, "decode")]


def no_such_task(members: dict[str, bytes]) -> None:
    members["json"] = members["json"].replace(b'"rv2v"', b'"rv3v"')


def one_visual_less(members: dict[str, bytes]) -> None:
    row = json.loads(members["json"])
    members["json"] = json.dumps({**row, "visuals": row["visuals"][:2]}).encode()


@pytest.mark.parametrize(("change", "rule"), [(no_such_task, "task"), (one_visual_less, "row")])
def test_rows_that_do_not_fit(change: Callable[[dict[str, bytes]], None], rule: str, tmp_path: Path, capsys) -> None:
    assert found(capsys, indexed(tmp_path, change)) == [("one", "json", rule)]


ROW = json.loads(encode(make_conversation(0, "rv2v"))["json"])
ROW["inputs"] = json.loads(ROW["inputs"])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all that is in a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@given(st.sampled_from(sorted(places(ROW), key=str)), st.sampled_from([None, 0, -1, 2**70, 1e308, "x", [], {}, [1]]))
def test_any_value_in_a_row_is_good_or_named(path: tuple[Any, ...], value: Any) -> None:
    row = copy.deepcopy(ROW)
    part = row
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    clip = Video("h264", 32, 32, 5, 8.0)
    try:
        row = parse_row({"json": json.dumps(row).encode()}, "")
        known = record(row, "one", {"v0.mp4": clip, "i1.png": clip, "v2.mp4": clip}, {}, "")
    except DataError as error:
        assert error.what
    else:
        stats = Stats("", known.conversation.task)
        stats.add(known, 1)
        assert json.loads(as_json([stats])) and as_csv([stats]) and list(lines([stats]))


def filled(value: float, at: slice) -> Media:
    media = posterior(2)
    assert media.posterior is not None
    media.posterior[at] = value
    return media


TENSORS = "prepared.safetensors"


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (sample(prompt="  "), [("json", "prompt")]),
        (sample("t2v"), [("json", "task")]),
        (sample("rv2v"), [("json", "task")]),
        (sample(source=make_clip(0, 9)), [("v1.mp4", "pair")]),
        (sample(source=replace(make_clip(0), fps=16.0)), [("v1.mp4", "pair")]),
        (sample(source=make_clip(0, 6), target=make_clip(1, 6)), [("v0.mp4", "frames"), ("v1.mp4", "frames")]),
        (sample(source=posterior(3), target=posterior(2)), [(TENSORS, "pair")]),
        (sample(source=posterior(2, 16.0), target=posterior(2)), [(TENSORS, "pair")]),
        (sample(source=filled(torch.nan, slice(1)), target=posterior(2)), [(TENSORS, "features")]),
        (sample(source=filled(3e38, slice(None)), target=posterior(2)), []),
    ],
    ids=["prompt", "sources", "references", "length", "rate", "frames", "latents", "latent rate", "nan", "large"],
)
def test_samples_that_are_served_but_wrong(
    one: Conversation, expected: list[tuple[str, str]], tmp_path: Path, capsys
) -> None:
    write_shards([one], tmp_path)
    assert found(capsys, tmp_path) == [("one", member, rule) for member, rule in expected]


def test_an_image_where_the_task_makes_a_clip(tmp_path: Path, capsys) -> None:
    one = make_conversation(0, "t2i")
    one.task = "t2v"
    write_shards([one], tmp_path)
    assert found(capsys, tmp_path) == [("t2i-0000", "json", "task")]


def test_tars_of_others(tmp_path: Path, capsys) -> None:
    with TarWriter(str(tmp_path / "others.tar"), encoder=False) as tar:
        tar.write({"__key__": "a", "mp4": encode_video(torch.zeros(3, 5, 32, 32).byte(), 8.0), "txt": b"x"})
    index_folder(tmp_path)
    assert found(capsys, tmp_path) == [("a", "json", "row")]
    assert found(capsys, tmp_path, "--ignore", "[row]") == []


def test_workers_and_urls_find_the_same(tmp_path: Path, capsys) -> None:
    write_shards((make_conversation(i) for i in range(6)), tmp_path, samples_per_shard=2)
    flip(tmp_path / "shard-000001.tar", member_at(tmp_path, "v2v-0003", "v1.mp4"))
    flip(tmp_path / "shard-000002.tar", member_at(tmp_path, "v2v-0005", "v0.mp4"))
    expected = [("v2v-0003", "v1.mp4", "hash"), ("v2v-0005", "v0.mp4", "hash")]
    assert found(capsys, tmp_path) == found(capsys, tmp_path, "--workers", "2") == expected
    with file_server(tmp_path) as server:
        assert main(["data", "lint", server.url, "--storage.allow_addresses", "[127.0.0.1]"]) == 1
    assert [line.split(": ")[1] for line in io.StringIO(capsys.readouterr().out)] == ["hash", "hash"]


def test_a_bar_shows_how_far_it_is(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards((make_conversation(i) for i in range(4)), tmp_path, samples_per_shard=1)
    seen: list[int] = []
    assert list(lint(Folder(tmp_path), progress=seen.append)) == [] and seen == [0, 1, 2, 3, 4]
    monkeypatch.setenv("FORCE_COLOR", "1")  # by which `rich` takes anything for a terminal
    assert main(["data", "lint", str(tmp_path), "--json"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out) == [] and "reading" in error and "100%" in error
    monkeypatch.delenv("FORCE_COLOR")
    assert found(capsys, tmp_path) == [] and not capsys.readouterr().err


def test_a_bad_line_is_no_finding(tmp_path: Path, capsys) -> None:
    make_shards(tmp_path, 8)
    with file_server(tmp_path) as server:
        server.share, server.stall = 0.3, 0.3
        options = ["--storage.backoff", "0.01", "--storage.timeout", "0.2", "--storage.retries", "20"]
        assert found(capsys, server.url, *options, "--storage.allow_addresses", "[127.0.0.1]") == []
    assert server.faults


def test_real_clips_as_they_were_shot(tmp_path: Path, capsys) -> None:
    write_pair(tmp_path / "clips")
    options = ["--fps", "null", "--max-frames", "null", "--max-edge", "null"]
    assert main(["prepare", str(tmp_path / "clips"), str(tmp_path / "shards"), *options]) == 0
    capsys.readouterr()
    assert found(capsys, tmp_path / "shards") == [("carphone", f"v{n}.mp4", "frames") for n in range(2)]

import json
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bernini.conversation import Conversation, Media, Message
from bernini.errors import BadSample, ConfigError, DataError
from bernini.media import encode_video, probe_video, write_image, write_video
from datamodules.buckets import Bounds
from datamodules.index import INDEX
from datamodules.scanning import index_folder
from datamodules.shards import Shards, write_shards
from datamodules.toyworld import items
from datamodules.toyworld.shards import write_toy_shards


def noise(frames: int, height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, frames, height, width), dtype=torch.uint8, generator=generator)


def edit(number: int) -> Conversation:
    source, target = Media(pixels=noise(5, seed=number), fps=16.0), Media(pixels=noise(5, seed=-number), fps=16.0)
    messages = [
        Message("video", media=source),
        Message("text", text=f"edit {number}"),
        Message("video_gen", media=target),
    ]
    return Conversation("v2v", messages, key=f"edit-{number}", info={"number": number, "nested": {"a": [1, 2.5, None]}})


def test_toy_tasks_come_back_exactly(tmp_path):
    tasks = ["t2i", "v2v", "rv2v", "ads2v", "r2i", "i2v"]
    shards = write_toy_shards(tmp_path, tasks, 12, seed=3, frames=5, height=32, width=32)
    made = list(items(tasks, 12, seed=3, frames=5, height=32, width=32))
    assert len(shards) == 12 and {entry.task for entry in shards.entries} == set(tasks)
    for number, original in enumerate(made):
        read = shards.read(number)
        assert (read.task, read.key, read.prompt, read.info) == (
            original.task,
            original.key,
            original.prompt,
            original.info,
        )
        assert [(m.type, m.has_loss) for m in read.messages] == [(m.type, m.has_loss) for m in original.messages]
        for ours, theirs in zip(read.media(), original.media(), strict=True):
            assert torch.equal(ours.pixels, theirs.pixels) and ours.fps == theirs.fps


def test_prepared_samples_come_back_exactly(tmp_path):
    posterior = torch.randn(8, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    sample = edit(1)
    for media, dtype in zip(sample.media(), (torch.bfloat16, torch.float32), strict=True):
        media.pixels, media.posterior = None, posterior.to(dtype)
        media.source = {"height": 100, "width": 150, "frames": 9, "fps": 30.0, "sampled": 5}
    sample.text_features = {"text": torch.randn(7, 12).half()}
    shards = write_shards([sample], tmp_path)
    assert set(shards.entries[0].members) == {"json", "prepared.safetensors"}
    read = shards.read(0)
    assert torch.equal(read.text_features["text"], sample.text_features["text"])
    for ours, theirs in zip(read.media(), sample.media(), strict=True):
        assert ours.pixels is None and torch.equal(ours.posterior, theirs.posterior)
        assert ours.posterior.dtype == theirs.posterior.dtype and ours.source == theirs.source


def test_a_file_without_changes_is_copied(tmp_path):
    write_video(tmp_path / "clip.mp4", noise(7), 24.0)
    write_image(tmp_path / "image.png", noise(1))
    messages = [
        Message("video", media=Media(path=str(tmp_path / "clip.mp4"))),
        Message("image", media=Media(path=str(tmp_path / "image.png"))),
        Message("text", text="x"),
    ]
    shards = write_shards([Conversation("vi2v", messages)], tmp_path / "out")
    members = shards.members(0)
    assert members["v0.mp4"] == (tmp_path / "clip.mp4").read_bytes()
    assert members["i1.png"] == (tmp_path / "image.png").read_bytes()
    clip, image = shards.read(0).media()
    assert clip.pixels.shape == (3, 9, 32, 48) and clip.source["sampled"] == 7 and clip.fps == 24.0
    assert torch.equal(image.pixels, noise(1))


def test_clips_are_shortened_and_resized_on_the_fly(tmp_path):
    sample = edit(0)
    for media in sample.media():
        media.pixels = noise(17, 64, 96)
        media.source = {"height": 640, "width": 960, "frames": 30, "fps": 30.0, "sampled": 16}
    read = write_shards([sample], tmp_path).read(0, Bounds(max_frames=8, max_edge=48))
    for media in read.media():
        assert media.pixels.shape == (3, 5, 32, 48)
        assert media.source == {"height": 640, "width": 960, "frames": 9, "fps": 30.0, "sampled": 5}


def test_the_format_is_plain_webdataset(tmp_path):
    write_shards(map(edit, range(5)), tmp_path, samples_per_shard=2, lossless=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX, *(f"shard-00000{n}.tar" for n in range(3))]
    from webdataset.tariterators import tarfile_samples

    found = [s for path in sorted(tmp_path.glob("*.tar")) for s in tarfile_samples([{"url": str(path)}])]
    assert [s["__key__"] for s in found] == [f"edit-{n}" for n in range(5)]
    row = json.loads(found[3]["json"])
    assert row["videos"] == [{"video_path": "v0.mp4"}, {"video_path": "v1.mp4"}] and row["schema"] == 1
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "clip.mp4").write_bytes(found[3]["v1.mp4"])
    assert probe_video(tmp_path / "again" / "clip.mp4") == {"height": 32, "width": 48, "frames": 5, "fps": 16.0}


def test_shards_are_reproducible_and_split_by_size(tmp_path):
    for name in ("a", "b"):
        write_shards(map(edit, range(4)), tmp_path / name, shard_bytes=1, lossless=True)
    files = [sorted((tmp_path / name).iterdir()) for name in ("a", "b")]
    assert len(files[0]) == 5
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_an_interrupted_run_leaves_no_shards(tmp_path):
    def samples():
        yield from map(edit, range(3))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shards(samples(), tmp_path, samples_per_shard=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["http://host/shards", "s3://bucket/x"])
def test_shards_are_written_to_local_folders(folder):
    with pytest.raises(ConfigError, match="local folders only") as error:
        write_shards([], folder)
    assert folder in error.value.where


def test_writer_errors(tmp_path):
    with pytest.raises(DataError, match="no sample to write"):
        write_shards([], tmp_path)
    with pytest.raises(DataError, match="comes twice"):
        write_shards([edit(1), edit(1)], tmp_path)
    for key in ("../evil", "a.b", "Upper", "x" * 65):
        bad = edit(1)
        bad.key = key
        with pytest.raises(DataError, match="is not allowed"):
            write_shards([bad], tmp_path)
    empty = edit(1)
    empty.messages[0].media = Media()
    with pytest.raises(DataError, match="neither pixels nor a file") as error:
        write_shards([empty], tmp_path)
    assert error.value.where == "edit-1, visual 0"
    empty.messages[0].media = Media(path=str(tmp_path / "none.mp4"))
    with pytest.raises(DataError, match="does not exist"):
        write_shards([empty], tmp_path)
    assert not list(tmp_path.iterdir())
    write_shards([edit(1)], tmp_path)
    with pytest.raises(ConfigError, match="already holds shards"):
        write_shards([edit(2)], tmp_path)
    with pytest.raises(ConfigError, match="no shards here"):
        Shards(tmp_path / "none")


def rewrite(shard: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Write a shard again with changed members, to be indexed anew."""
    with tarfile.open(shard) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    change(members)
    with tarfile.open(shard, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    (shard.parent / INDEX).unlink()


@pytest.mark.parametrize(
    ("change", "message", "where"),
    [
        (lambda m: m.pop("edit-0.v1.mp4"), "v1.mp4 of the sample is missing", "edit-0"),
        (lambda m: m.pop("edit-0.json"), "the sample has no row", "edit-0.json"),
        (lambda m: m.update({"edit-0.json": b"{"}), "the row is not JSON", "edit-0.json"),
        (lambda m: m.update({"edit-0.json": b'{"schema": 7}'}), "schema 7 instead of 1", "edit-0.json"),
        (lambda m: m.update({"edit-0.v0.mp4": encode_video(noise(5), 16)[:900]}), "cannot be decoded", "edit-0.v0.mp4"),
        (lambda m: m.update({"edit-0.pkl": b"x"}), "a member is not allowed", "edit-0.pkl"),
        (lambda m: m.update({"../x.json": b"x"}), "a member is not allowed", "../x.json"),
    ],
)
def test_damaged_members(tmp_path, change, message, where):
    write_shards([edit(0)], tmp_path)
    rewrite(tmp_path / "shard-000000.tar", change)
    with pytest.raises(DataError, match=message) as error:
        index_folder(tmp_path)
        Shards(tmp_path).read(0)
    assert "shard-000000.tar" in error.value.where and where in error.value.where and error.value.fix


@given(data=st.data())
def test_damage_to_headers_never_loses_samples_silently(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("shards")
    made = write_shards([Conversation("t2v", [Message("text", text=f"{n}")], key=f"k{n}") for n in range(4)], folder)
    shard = folder / "shard-000000.tar"
    (folder / INDEX).unlink()
    whole = bytearray(shard.read_bytes())
    ends = [member.at for entry in made.entries for member in entry.members.values()]
    header = data.draw(st.sampled_from(ends)) - 512
    if data.draw(st.booleans()):
        at = header + data.draw(st.sampled_from([*range(0, 10), *range(124, 135), *range(148, 156)]))
        whole[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        whole = whole[: header + data.draw(st.integers(1, 511))]
    shard.write_bytes(whole)
    try:
        index_folder(folder)
        found = Shards(folder)
    except DataError as error:
        assert "shard-000000.tar" in error.where
    else:
        assert len(found) == 4


def test_a_shard_that_is_not_the_indexed_one(tmp_path):
    write_shards([edit(0)], tmp_path)
    shard = tmp_path / "shard-000000.tar"
    opened = Shards(tmp_path)
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(BadSample, match="cut short"):
        opened.read(0)
    with pytest.warns(UserWarning, match="has 3000 bytes, the index says"):
        Shards(tmp_path)
    shard.rename(tmp_path / "other.tar")
    with pytest.raises(DataError, match=r"other.tar is not in the index"):
        Shards(tmp_path)
    (tmp_path / "other.tar").unlink()
    with pytest.raises(DataError, match="is in the index but not here"):
        Shards(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ConfigError, match="no shards here"):
        Shards(tmp_path)
    (tmp_path / "shard-000000.tar").touch()
    with pytest.raises(ConfigError, match=r"no index\.jsonl") as missing:
        Shards(tmp_path)
    assert "bernini data index" in missing.value.fix
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(DataError, match="index cannot be read"):
        Shards(tmp_path)

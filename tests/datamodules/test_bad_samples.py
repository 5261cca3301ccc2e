import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import make_shards
from recording import Recorder, keys_in, make_trainer, read_rows, samples

from bernini.errors import DataError
from datamodules import VideoDataModule
from datamodules.index import INDEX
from datamodules.mixing import SourceConfig
from datamodules.scanning import index_folder
from datamodules.shards import Shards, write_shards


def damage(folder: Path, numbers: list[int]) -> list[str]:
    """Zeros in the images of some samples; their keys."""
    shards = Shards(folder)
    for entry in (shards.entries[number] for number in numbers):
        member = next(member for name, member in entry.members.items() if name.endswith("png"))
        with (folder / entry.shard).open("r+b") as file:
            file.seek(member.at)
            file.write(bytes(member.size))
    return [shards.entries[number].key for number in numbers]


def fit(root: Path, folder: Path, devices: int = 1, batch_size: int = 4, **options: Any) -> list[list[str]]:
    data = VideoDataModule(train=str(folder), batch_size=batch_size, seed=1, **options)
    strategy = "ddp_fork" if devices > 1 else "auto"
    run = make_trainer(default_root_dir=root, devices=devices, strategy=strategy, max_epochs=2)
    root.mkdir()
    run.fit(Recorder(root / "log"), data)
    ranks = [keys_in(read_rows(root / "log", rank)) for rank in range(devices)]
    return [[key for keys in step for key in keys] for step in zip(*ranks, strict=True)]


def rows(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "bad_samples.jsonl").read_text().splitlines()]


def test_bad_samples_are_replaced_alike_at_any_number_of_ranks_and_workers(tmp_path):
    write_shards(samples(24), tmp_path / "good", samples_per_shard=9)
    write_shards(samples(24), tmp_path / "shards", samples_per_shard=9)
    bad = damage(tmp_path / "shards", [3, 4, 10, 11, 20])
    whole = fit(tmp_path / "whole", tmp_path / "good")
    one = fit(tmp_path / "one", tmp_path / "shards", max_bad_share=1.0)
    assert not {key for keys in one for key in keys} & set(bad)
    for expected, keys in zip(whole, one, strict=True):
        assert all(a == b for a, b in zip(expected, keys, strict=True) if a not in bad), "the others keep their places"
    assert fit(tmp_path / "workers", tmp_path / "shards", workers=2, max_bad_share=1.0) == one
    assert fit(tmp_path / "ranks", tmp_path / "shards", devices=2, batch_size=2, max_bad_share=1.0) == one
    written = rows(tmp_path / "one")
    assert {row["key"] for row in written} == set(bad)
    firsts = {(row["key"], row["epoch"]): row for row in written}
    shards = Shards(tmp_path / "shards")
    for row in firsts.values():
        entry = next(entry for entry in shards.entries if entry.key == row["key"])
        assert row["shard"] == str(tmp_path / "shards" / entry.shard) and row["member"] == "i0.png"
        assert row["offset"] == entry.members["i0.png"].at and "those that were indexed" in row["reason"]
        assert row["replaced_by"] not in bad and row["rank"] == 0
    by_key = lambda row: (row["step"], row["key"], row["replaced_by"])  # noqa: E731
    ranks = [{**row, "rank": 0} for row in rows(tmp_path / "ranks")]
    assert sorted(ranks, key=by_key) == sorted(written, key=by_key)
    assert {row["rank"] for row in rows(tmp_path / "ranks")} == {0, 1}


def test_a_run_with_too_many_bad_samples_stops(tmp_path):
    write_shards(samples(60), tmp_path / "shards")
    damage(tmp_path / "shards", list(range(0, 40, 2)))
    with pytest.raises(DataError, match=r"\d\d of \d+ samples were bad, more than 0.100%") as error:
        fit(tmp_path / "run", tmp_path / "shards")
    assert "bad_samples.jsonl" in error.value.where and "those that were indexed" in error.value.why
    assert len(rows(tmp_path / "run")) >= 10


def test_a_few_bad_samples_of_a_small_set_do_not_stop_a_run(tmp_path):
    write_shards(samples(48), tmp_path / "shards")
    bad = damage(tmp_path / "shards", [7])
    fit(tmp_path / "run", tmp_path / "shards")
    assert [row["key"] for row in rows(tmp_path / "run")] == 2 * bad, "in two epochs"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_hundred_bad_samples_in_a_row_stop_a_run(tmp_path, workers):
    write_shards(_many(130), tmp_path / "shards")
    damage(tmp_path / "shards", list(range(130)))
    with pytest.raises(DataError, match="100 bad samples in a row"):
        fit(tmp_path / "run", tmp_path / "shards", workers=workers)


def _many(count: int) -> Any:
    for number, sample in enumerate(samples(count)):
        sample.key = f"many-{number:03d}"
        yield sample


def test_the_replacement_of_a_sample_does_not_depend_on_its_batch(tmp_path):
    """Where an epoch ends within a batch, each sample has its own: accumulation may take the place of ranks."""
    write_shards(samples(7), tmp_path / "shards")
    damage(tmp_path / "shards", [0, 1])
    trained = []
    for size in (1, 3):
        data = VideoDataModule(train=str(tmp_path / "shards"), batch_size=size, seed=1, max_bad_share=1.0)
        data.setup("fit")
        keys: list[str] = []
        while len(keys) < 21:
            for batch in data.train_dataloader():
                keys += [sample.key for sample in batch.samples]
                data.commit(batch.cursor)
        trained.append(keys[:21])
    assert trained[0] == trained[1]


def test_a_replacement_is_of_the_same_source(tmp_path):
    for name, count in (("a", 6), ("b", 6)):
        write_shards(samples(count, prefix=name), tmp_path / name)
    damage(tmp_path / "a", [0, 2, 3])
    sources = {name: SourceConfig(str(tmp_path / name)) for name in "ab"}
    data = VideoDataModule(train=sources, batch_size=4, seed=1)
    data.setup("fit")
    drawn = [[sample.key[0] for sample in batch.samples] for batch in data.train_dataloader()]
    assert drawn == [["a", "b", "a", "b"]] * 3 or drawn == [["b", "a", "b", "a"]] * 3


@pytest.mark.parametrize("indexed_before", [True, False])
def test_a_damaged_clip_is_named_and_replaced(tmp_path, indexed_before):
    """By its hash or, if it was indexed as it is, by the decoder."""
    folder = make_shards(tmp_path / "shards", 6, ("t2v",))
    entry = Shards(folder).entries[2]
    clip = entry.members["v0.mp4"]
    with (folder / entry.shard).open("r+b") as file:
        start = file.read().index(b"mdat", clip.at)
        file.seek(start + 12)
        file.write(bytes(200))
    if not indexed_before:
        (folder / INDEX).unlink()
        index_folder(folder)
    data = VideoDataModule(train=str(folder), batch_size=6, seed=1)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    (row,) = batch.bad
    assert len(batch) == 6 and (row["key"], row["member"], row["offset"]) == (entry.key, "v0.mp4", clip.at)
    assert row["reason"].startswith("the bytes are not" if indexed_before else "the clip")
    assert batch.to(torch.device("cpu")).bad == batch.bad


def test_a_shard_that_is_gone_is_no_bad_sample(tmp_path):
    write_shards(samples(9), tmp_path / "shards", samples_per_shard=3)
    data = VideoDataModule(train=str(tmp_path / "shards"), batch_size=3, seed=1)
    data.setup("fit")
    (tmp_path / "shards" / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match="the shard cannot be opened"):
        list(data.train_dataloader())

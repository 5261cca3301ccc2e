import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import make_shards
from test_video import Recorder, samples, seen, trainer

from bernini.errors import DataError
from datamodules import VideoDataModule
from datamodules.shards import Shards, write_shards


def damage(folder: Path, numbers: list[int]) -> list[str]:
    """Zeros in the images of some samples; their keys."""
    shards = Shards(folder)
    for entry in (shards.entries[number] for number in numbers):
        offset, size = next(span for name, span in entry.members.items() if name.endswith("png"))
        with (folder / entry.shard).open("r+b") as file:
            file.seek(offset)
            file.write(bytes(size))
    return [shards.entries[number].key for number in numbers]


def fit(root: Path, folder: Path, devices: int = 1, batch_size: int = 4, **options: Any) -> list[list[str]]:
    data = VideoDataModule(train=str(folder), batch_size=batch_size, seed=1, **options)
    strategy = "ddp_fork" if devices > 1 else "auto"
    run = trainer(default_root_dir=root, devices=devices, strategy=strategy, max_epochs=2)
    root.mkdir()
    run.fit(Recorder(root / "log"), data)
    ranks = [seen(root / "log", rank=rank) for rank in range(devices)]
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
        assert row["offset"] == entry.members["i0.png"][0] and "cannot be read" in row["reason"]
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
    assert "bad_samples.jsonl" in error.value.where and "cannot be read" in error.value.why
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


def test_a_damaged_clip_is_named_and_replaced(tmp_path):
    folder = make_shards(tmp_path / "shards", 6, ("t2v",))
    entry = Shards(folder).entries[2]
    offset, size = entry.members["v0.mp4"]
    with (folder / entry.shard).open("r+b") as file:
        file.seek(offset + 48)
        file.write(bytes(size - 48))
    data = VideoDataModule(train=str(folder), batch_size=6, seed=1)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert len(batch) == 6 and [row["key"] for row in batch.bad] == [entry.key]
    assert batch.bad[0]["member"] == "v0.mp4" and batch.bad[0]["offset"] == offset
    assert batch.to(torch.device("cpu")).bad == batch.bad

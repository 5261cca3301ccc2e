from typing import Any

import pytest
from recording import Recorder, keys_in, make_shards, make_trainer, read_rows, samples

from bernini.errors import BadSample, ConfigError, DataError
from datamodules import VideoDataModule
from datamodules.index import INDEX
from datamodules.scanning import index_folder
from datamodules.shards import write_shards

SIZE = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("data") / "shards", SIZE)


def keys_of(data: VideoDataModule, epochs: int) -> list[list[str]]:
    """Keys of the batches of some epochs, without a trainer."""
    data.setup("fit")
    rows = []
    for _ in range(epochs):
        for batch in data.train_dataloader():
            rows.append([s.key for s in batch.samples])
            data.commit(batch.cursor)
    return rows


def test_two_ranks_make_the_same_global_batches_as_one(folder, tmp_path):
    for name, devices, batch_size, strategy in (("one", 1, 4, "auto"), ("two", 2, 2, "ddp_fork")):
        data = VideoDataModule(train=folder, val=folder, batch_size=batch_size, eval_batch_size=2, seed=1)
        make_trainer(devices=devices, strategy=strategy, max_epochs=2).fit(Recorder(tmp_path / name), data)
    one = keys_in(read_rows(tmp_path / "one"))
    rows = [read_rows(tmp_path / "two", rank) for rank in range(2)]
    assert one == [first + second for first, second in zip(*map(keys_in, rows), strict=True)]
    assert len(one) == 2 * (SIZE // 4)
    flat = [key for keys in one for key in keys]
    assert len(set(flat[:SIZE])) == SIZE, "the second epoch begins with what did not fill a batch of the first"
    validated: list[str] = []
    for mine in rows:
        mine = [row for row in mine if row["stage"] == "validate"]
        assert len(mine) == 2 * 6
        validated += [k for row in mine for k, pad in zip(row["keys"], row["padding"], strict=True) if not pad]
    assert sorted(validated) == sorted(2 * [f"s{n:03d}" for n in range(SIZE)])


@pytest.mark.parametrize(("workers", "start_method"), [(1, "fork"), (2, "fork"), (1, "spawn")])
def test_workers_do_not_change_the_order(folder, workers, start_method):
    asked: dict[str, Any] = {"train": folder, "batch_size": 4, "seed": 2}
    epochs = 1 if start_method == "spawn" else 2
    expected = keys_of(VideoDataModule(**asked), epochs)
    assert keys_of(VideoDataModule(**asked, workers=workers, start_method=start_method), epochs) == expected


def test_test_and_predict_give_every_sample_in_order(folder):
    data = VideoDataModule(test=folder, predict=folder, eval_batch_size=4, max_samples=10)
    model = Recorder()
    make_trainer().test(model, data, verbose=False)
    make_trainer().predict(model, data)
    keys = [f"s{n:03d}" for n in range(10)]
    for stage in ("test", "predict"):
        assert keys_in(model.rows, stage) == [keys[:4], keys[4:8], keys[8:]]


def test_tasks(folder, tmp_path):
    both = [folder, make_shards(tmp_path / "more", 7, "t2v", "v")]
    assert {k[0] for keys in keys_of(VideoDataModule(train=both, tasks=["t2v"]), 1) for k in keys} == {"v"}
    with pytest.raises(ConfigError, match="no sample of task v2v") as error:
        VideoDataModule(train=both, tasks=["v2v"]).setup("fit")
    assert "t2i, t2v" in error.value.why


def test_errors(folder, tmp_path):
    def use(**kwargs: Any) -> None:
        data = VideoDataModule(**kwargs)
        data.setup("fit")
        data.train_dataloader()

    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "no train data"),
        ({"train": str(tmp_path)}, "no shards here"),
        ({"train": []}, "no train data"),
        ({"train": folder, "batch_size": 24}, "23 training samples, but a global batch takes 24"),
        ({"train": folder, "batch_size": 0}, "batch sizes and shuffle_shards are 1 or more"),
        ({"train": folder, "tasks": ["t2x"]}, "unknown task 't2x'"),
        ({"train": folder, "shuffle_shards": 0}, "shuffle_shards are 1 or more"),
    ]
    for kwargs, message in cases:
        with pytest.raises(ConfigError, match=message):
            use(**kwargs)
    with pytest.raises(ConfigError, match="no val data"):
        VideoDataModule(train=folder).setup("validate")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_one_clear_error_also_from_a_worker(tmp_path, workers):
    bad = next(samples(1))
    bad.messages.pop()
    write_shards([bad], tmp_path)
    data = VideoDataModule(train=str(tmp_path), predict=str(tmp_path), workers=workers)
    data.setup("fit")
    with pytest.raises(DataError) as error:
        next(iter(data.train_dataloader()))
    assert error.value.what == "the sample has no target" and error.value.where and "Traceback" not in str(error.value)
    data.setup("predict")
    assert len(list(data.predict_dataloader())) == 1, "predicting needs no target"
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"inputs"', b'"putins"'))
    with pytest.raises(BadSample, match="not those that were indexed") as damaged:
        list(data.predict_dataloader())
    assert (damaged.value.shard, damaged.value.key, damaged.value.member) == (str(shard), bad.key, "json")
    (tmp_path / INDEX).unlink()
    index_folder(tmp_path)
    data = VideoDataModule(predict=str(tmp_path), workers=workers)
    data.setup("predict")
    with pytest.raises(BadSample, match="not in the released format: KeyError"):
        list(data.predict_dataloader())

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from bernini.conversation import Batch, Conversation, Media, Message
from bernini.errors import BadSample, ConfigError, DataError
from datamodules import VideoDataModule
from datamodules.index import INDEX
from datamodules.order import eval_requests, mixture, permutation, train_requests
from datamodules.scanning import index_folder
from datamodules.shards import write_shards

SIZE = 23


def samples(count: int, task: str = "t2i", prefix: str = "s") -> Iterator[Conversation]:
    for number in range(count):
        pixels = torch.full((3, 1, 16, 16), number, dtype=torch.uint8)
        messages = [Message("text", text=f"{number}"), Message("image_gen", media=Media(pixels=pixels))]
        yield Conversation(task, messages, key=f"{prefix}{number:02d}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "shards"
    write_shards(samples(SIZE), path, samples_per_shard=5)
    return str(path)


class Recorder(L.LightningModule):
    """A real model that writes the keys of the batches it trained on to a file per rank."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log_file, self.net = log, torch.nn.Linear(1, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self._step(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(batch)

    test_step = predict_step = validation_step

    def _step(self, batch: Batch) -> torch.Tensor:
        row = {
            "stage": self.trainer.state.stage.value,
            "keys": [s.key for s in batch.samples],
            "padding": [bool(s.info.get("padding")) for s in batch.samples],
        }
        with self.log_file.with_suffix(f".{self.global_rank}").open("a") as file:
            file.write(json.dumps(row) + "\n")
        mean = torch.stack([next(s.media()).pixels.float().mean() for s in batch.samples]).mean()
        return self.net(mean.view(1, 1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-9)


def trainer(**kwargs: Any) -> L.Trainer:
    defaults: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    defaults |= {"enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return L.Trainer(**(defaults | kwargs))


def seen(log: Path, stage: str = "train", rank: int = 0) -> list[list[str]]:
    rows = map(json.loads, log.with_suffix(f".{rank}").read_text().splitlines())
    return [row["keys"] for row in rows if row["stage"] == stage]


def keys_of(data: VideoDataModule, epochs: int) -> list[list[str]]:
    """Keys of the batches of some epochs, without a trainer."""
    data.setup("fit")
    rows = []
    for _ in range(epochs):
        for batch in data.train_dataloader():
            rows.append([s.key for s in batch.samples])
            data.commit(batch.cursor)
    return rows


@given(seed=st.integers(0, 2**31), epoch=st.integers(0, 1000), size=st.integers(1, 300))
def test_permutation(seed, epoch, size):
    order = permutation(seed, epoch, size).tolist()
    assert sorted(order) == list(range(size))
    assert order == permutation(seed, epoch, size).tolist()
    if size > 20:
        assert order != permutation(seed, epoch + 1, size).tolist() != permutation(seed + 1, epoch + 1, size).tolist()


@given(
    size=st.integers(1, 200),
    shape=st.sampled_from([(1, 1), (4, 1), (2, 2), (1, 4), (3, 2)]),
    start=st.integers(0, 60),
)
def test_train_requests(size, shape, start):
    batch_size, world = shape
    order = permutation(0, 0, size)
    ranks = [list(train_requests(order, {"epoch": 7, "sample": start}, batch_size, r, world)) for r in range(world)]
    together = [[n for request in step for n in request.samples] for step in zip(*ranks, strict=True)]
    flat = [n for step in together for n in step]
    assert flat == order[start : start + len(flat)].tolist(), "ranks side by side are the global order"
    assert max(0, size - start - len(flat)) < batch_size * world, "less than a batch is left out"
    for number, step in enumerate(zip(*ranks, strict=True), 1):
        assert len({tuple(request.cursor.items()) for request in step}) == 1
        last = number == len(together)
        expected = {"epoch": 8, "sample": 0} if last else {"epoch": 7, "sample": start + number * batch_size * world}
        assert step[0].cursor == expected


@given(size=st.integers(1, 100), batch_size=st.integers(1, 5), world=st.integers(1, 5))
def test_eval_requests(size, batch_size, world):
    ranks = [eval_requests(size, batch_size, rank, world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    steps = zip(*ranks, strict=True)
    real = [n for step in steps for request in step for n in request.samples[: len(request.samples) - request.padding]]
    assert real == list(range(size))
    assert all(request.samples for rank in ranks for request in rank)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    weights=st.lists(st.floats(0.05, 10), min_size=5, max_size=5),
)
def test_mixture_keeps_the_shares_at_every_moment(sizes, weights):
    groups, at = [], 0
    for size in sizes:
        groups.append(list(range(at, at + size)))
        at += size
    weights = weights[: len(groups)]
    order = mixture(1, 2, groups, weights)
    assert len(order) == at and order.tolist() == mixture(1, 2, groups, weights).tolist()
    for group, weight in zip(groups, weights, strict=True):
        drawn = torch.isin(torch.from_numpy(order), torch.tensor(group)).cumsum(0)
        asked = torch.arange(1, at + 1) * weight / sum(weights)
        assert (drawn - asked).abs().max() <= 2
        first = [n for n in order.tolist() if n in group][: len(group)]
        assert len(set(first)) == len(first), "no repetition before a group runs out"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_at_any_step_the_batches_go_on_as_if_nothing_had_happened(folder, tmp_path, accumulate):
    """23 samples in batches of 3: seven batches an epoch, so that accumulation crosses its end too."""

    def run(name: str, steps: int, resume: Path | None = None) -> Path:
        keep = ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=1)
        fit = trainer(
            max_steps=steps, accumulate_grad_batches=accumulate, enable_checkpointing=True, callbacks=[keep],
            val_check_interval=3, check_val_every_n_epoch=None, limit_val_batches=1,
        )  # fmt: skip
        data = VideoDataModule(train=folder, val=folder, batch_size=3, seed=5)
        fit.fit(Recorder(tmp_path / f"{name}.log"), data, ckpt_path=resume)
        return tmp_path / f"{name}.log"

    steps = 18 if accumulate == 1 else 9
    whole = seen(run("whole", steps))
    expected = keys_of(VideoDataModule(train=folder, batch_size=3, seed=5), 3)
    assert whole == expected[: len(whole)] and len({tuple(keys) for keys in whole}) > 14
    batches_after = [b for b in range(1, len(whole) + 1) if (e := (b - 1) % 7 + 1) % accumulate == 0 or e == 7]
    for step in range(1, steps):
        name = f"from{step}"
        rest = seen(run(name, steps, tmp_path / "whole" / f"step={step}.ckpt"))
        assert rest == whole[batches_after[step - 1] :], f"after step {step}"
        if step == 3:  # a second interruption of the same run, later in the epoch and in the next one
            for again in (4, 7):
                second = seen(run(f"{name}-{again}", steps, tmp_path / name / f"step={again}.ckpt"))
                assert second == whole[batches_after[again - 1] :], f"after steps 3 and {again}"


def test_two_ranks_make_the_same_global_batches_as_one(folder, tmp_path):
    for name, devices, batch_size, strategy in (("one", 1, 4, "auto"), ("two", 2, 2, "ddp_fork")):
        data = VideoDataModule(
            train=folder, val=folder, predict=folder, batch_size=batch_size, eval_batch_size=2, seed=1
        )
        model = Recorder(tmp_path / name)
        fit = trainer(devices=devices, strategy=strategy, max_epochs=2)
        fit.fit(model, data)
    one = seen(tmp_path / "one")
    ranks = [seen(tmp_path / "two", rank=rank) for rank in range(2)]
    assert one == [first + second for first, second in zip(*ranks, strict=True)]
    assert len(one) == 2 * (SIZE // 4)
    assert all(not set(first) & set(second) for first, second in zip(*ranks, strict=True))
    validated: list[str] = []
    for rank in range(2):
        rows = [json.loads(line) for line in (tmp_path / f"two.{rank}").read_text().splitlines()]
        rows = [row for row in rows if row["stage"] == "validate"]
        assert len(rows) == 2 * 6
        validated += [k for row in rows for k, pad in zip(row["keys"], row["padding"], strict=True) if not pad]
    assert sorted(validated) == sorted(2 * [f"s{n:02d}" for n in range(SIZE)])


@pytest.mark.parametrize(("workers", "start_method"), [(1, "fork"), (2, "fork"), (1, "spawn")])
def test_workers_do_not_change_the_order(folder, workers, start_method):
    asked: dict[str, Any] = {"train": folder, "batch_size": 4, "seed": 2}
    epochs = 1 if start_method == "spawn" else 2
    expected = keys_of(VideoDataModule(**asked), epochs)
    assert keys_of(VideoDataModule(**asked, workers=workers, start_method=start_method), epochs) == expected


def test_test_and_predict_give_every_sample_in_order(folder, tmp_path):
    data = VideoDataModule(test=folder, predict=folder, eval_batch_size=4, max_samples=10)
    run = trainer()
    run.test(Recorder(tmp_path / "log"), data, verbose=False)
    run.predict(Recorder(tmp_path / "log"), data)
    keys = [f"s{n:02d}" for n in range(10)]
    for stage in ("test", "predict"):
        assert seen(tmp_path / "log", stage) == [keys[:4], keys[4:8], keys[8:]]


def test_another_number_of_ranks_goes_on_at_the_same_sample(folder):
    first = VideoDataModule(train=folder, batch_size=4, seed=3)
    first.setup("fit")
    batches = iter(first.train_dataloader())
    for _ in range(3):
        batch = next(batches)
    first.commit(batch.cursor)
    second = VideoDataModule(train=folder, batch_size=2, seed=3)
    second.setup("fit")
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = [s.key for batch in second.train_dataloader() for s in batch.samples]
    assert rest == [s.key for batch in batches for s in batch.samples] + rest[-2:] and len(rest) == 10
    second.commit({"epoch": 0, "sample": 22})
    third = VideoDataModule(train=folder, batch_size=8, seed=3)
    third.setup("fit")
    third.load_state_dict(second.state_dict())
    rest = [s.key for batch in third.train_dataloader() for s in batch.samples]
    assert rest == [f"s{n:02d}" for n in permutation(3, 1, SIZE)[:16]], "less than a batch is left of epoch 0"


def test_resuming_with_other_data_is_refused(folder, tmp_path):
    write_shards(samples(SIZE - 1), tmp_path / "other")
    state = VideoDataModule(train=folder)
    state.setup("fit")
    weighted = {"train": folder, "weights": {"t2i": 1.0}}
    for wrong in ({"train": str(tmp_path / "other")}, {"train": folder, "seed": 9}, weighted):
        data = VideoDataModule(**wrong)
        data.setup("fit")
        data.load_state_dict(state.state_dict())
        with pytest.raises(
            ConfigError, match=r"the checkpoint's training data has (size 23, this run's has 22|seed 0|weights None)"
        ):
            data.train_dataloader()


def test_tasks_and_weights(folder, tmp_path):
    write_shards(samples(7, "t2v", "v"), tmp_path / "more")
    both = [folder, str(tmp_path / "more")]
    assert {k[0] for keys in keys_of(VideoDataModule(train=both, tasks=["t2v"]), 1) for k in keys} == {"v"}
    drawn = [k[0] for keys in keys_of(VideoDataModule(train=both, weights={"t2v": 2, "t2i": 1}), 1) for k in keys]
    assert len(drawn) == SIZE + 7 and drawn.count("v") == 20 and drawn[:6].count("v") == 4
    only = VideoDataModule(train=both, weights={"t2v": 1.0}, batch_size=7)
    assert len(keys_of(only, 1)) == 1
    with pytest.raises(ConfigError, match="unknown task 't2w'"):
        VideoDataModule(train=both, weights={"t2w": 1})
    for wrong in ({"tasks": ["v2v"]}, {"weights": {"v2v": 1.0}}):
        with pytest.raises(ConfigError, match="no sample of task v2v") as error:
            VideoDataModule(train=both, **wrong).setup("fit")
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
        ({"train": folder, "batch_size": 0}, "batch sizes are 1 or more"),
        ({"train": folder, "tasks": ["t2x"]}, "unknown task 't2x'"),
        ({"train": folder, "weights": {"t2i": 0.0}}, "every weight must be positive"),
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

"""A run that was broken off goes on with the batch after the last optimizer step, wherever that was."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from recording import Recorder, StopAfter, make_shards, make_trainer

from bernini.errors import ConfigError
from datamodules import VideoDataModule
from datamodules.mixing import SourceConfig

SIZE, STEP, STEPS = 163, 8, 60  # samples, a global batch, and three epochs of 20 steps with three samples to spare
NEXT = 5
ENDS = [1, 2, 11, 19, 20, 21, 40, 41, 59, 60]  # steps around the ends of epochs, and some between


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(tmp_path_factory.mktemp("data") / "shards", SIZE, samples_per_shard=20)


def run(folder: str, accumulate: int, resume: Path | None = None, **kwargs: Any) -> Recorder:
    model = Recorder()
    data = VideoDataModule(train=folder, val=folder, batch_size=STEP // accumulate, max_samples=6, seed=5)
    fit = make_trainer(accumulate_grad_batches=accumulate, **({"limit_val_batches": 0} | kwargs))
    fit.fit(model, data, ckpt_path=resume)
    return model


def passes(batches: list[list[str]]) -> list[list[str]]:
    """The whole passes over the data that batches make."""
    keys = [key for batch in batches for key in batch]
    return [keys[first : first + SIZE] for first in range(0, len(keys) - SIZE + 1, SIZE)]


@pytest.mark.parametrize("length", [{"max_steps": STEPS}, {"max_epochs": 3}], ids=["max_steps", "max_epochs"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_saved_at_each_of_60_steps_the_next_batches_are_those_of_the_unbroken_run(
    folder: str, tmp_path: Path, accumulate: int, length: dict[str, int], pytestconfig: pytest.Config
) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = run(folder, accumulate, enable_checkpointing=True, callbacks=[keep], **length).trained
    assert len(whole) == STEPS * accumulate
    assert all(len(set(keys)) == SIZE for keys in passes(whole)), "every sample once, before any comes again"
    for step in range(1, STEPS + 1) if pytestconfig.getoption("saves") else ENDS:
        done = step * accumulate
        resumed = run(folder, accumulate, tmp_path / f"step={step}.ckpt", callbacks=[StopAfter(NEXT)], **length)
        assert resumed.trained == whole[done : done + NEXT], f"after step {step}"


def test_broken_off_five_times_in_an_epoch_and_at_its_end(folder: str, tmp_path: Path) -> None:
    kept: dict[str, Any] = {"max_steps": STEPS, "enable_checkpointing": True}
    whole = run(folder, 1, max_steps=STEPS).trained
    trained: list[list[str]] = []
    last = None
    for part, batches in enumerate([3, 1, 6, 2, 4, 4, 20, 7]):  # the sixth ends the first epoch, the seventh the second
        keep = ModelCheckpoint(tmp_path / str(part), save_last=True, every_n_train_steps=1)
        trained += run(folder, 1, last, callbacks=[keep, StopAfter(batches)], **kept).trained
        last = tmp_path / str(part) / "last.ckpt"
    trained += run(folder, 1, last, max_steps=STEPS).trained
    assert trained == whole


class StopAtStep(L.Callback):
    """Ends training after an optimizer step, and counts the batches of each."""

    def __init__(self, step: int) -> None:
        self.step, self.since = step, 0
        self.batches: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.since += 1

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.batches.append(self.since)
        self.since = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_accumulation_takes_the_place_of_ranks_in_mid_epoch(folder: str, tmp_path: Path) -> None:
    """Eight ranks that become two, four and one: here the batches of one rank become smaller, and more of them."""

    def in_steps(model: Recorder) -> list[str]:
        return [key for keys in model.trained for key in keys]

    whole = in_steps(run(folder, 1, max_steps=STEPS))
    for order in ([1, 4, 2, 8, 1], [8, 1, 4]):
        trained: list[str] = []
        last = None
        for steps, accumulate in zip([7, 20, 33, 48, STEPS], order, strict=False):
            keep = ModelCheckpoint(tmp_path / f"{order[0]}-{steps}", save_last=True, every_n_train_steps=1)
            stop = StopAtStep(steps)
            model = run(folder, accumulate, last, max_steps=STEPS, enable_checkpointing=True, callbacks=[keep, stop])
            assert all(batches == accumulate for batches in stop.batches), "every step takes a whole global batch"
            trained += in_steps(model)
            assert trained == whole[: steps * STEP]
            last = tmp_path / f"{order[0]}-{steps}" / "last.ckpt"


class DieInValidation(L.Callback):
    """Saves in the middle of validation, and dies."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == 2:
            trainer.save_checkpoint(self.file)
            raise RuntimeError("as if the machine had died")


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("after", [7, 20])
def test_broken_off_in_validation(folder: str, tmp_path: Path, accumulate: int, after: int) -> None:
    validating: dict[str, Any] = {"val_check_interval": after * accumulate, "limit_val_batches": 1.0, "max_steps": 43}
    whole = run(folder, accumulate, **validating).trained
    with pytest.raises(RuntimeError, match="died"):
        run(folder, accumulate, callbacks=[DieInValidation(tmp_path / "died.ckpt")], **validating)
    rest = run(folder, accumulate, tmp_path / "died.ckpt", **validating).trained
    assert rest == whole[after * accumulate :]


def test_what_a_checkpoint_holds_of_the_data_is_a_little_json(folder: str) -> None:
    mixed = {f"source{number}": SourceConfig(folder, weight={0: number + 1, 10**6: 0.5}) for number in range(16)}
    data = VideoDataModule(train=mixed)
    data.setup("fit")
    data.commit({"epoch": 12345, "sample": 10**9})
    saved = json.dumps(data.state_dict())
    assert len(saved) < 1024
    assert json.loads(saved).keys() == {"version", "epoch", "sample", "seed", "fingerprint", "mix", "packing", "batch"}


def test_resuming_with_other_data_is_refused(folder: str, tmp_path: Path) -> None:
    def opened(**arguments: Any) -> VideoDataModule:
        data = VideoDataModule(**{"train": folder, **arguments})
        data.setup("fit")
        return data

    saved = opened().state_dict()
    other = make_shards(tmp_path / "other", SIZE - 1)
    mixed = {"a": SourceConfig(folder), "b": SourceConfig(other, weight=2)}
    for arguments, unlike in (
        ({"train": other}, {"fingerprint"}),
        ({"seed": 9}, {"seed"}),
        ({"shuffle_shards": 2}, {"mix"}),
        ({"train": other, "seed": 9}, {"seed", "fingerprint"}),
        ({"train": mixed}, {"fingerprint", "mix"}),
        ({"train": {**mixed, "b": SourceConfig(other, weight=3)}}, {"fingerprint", "mix"}),
    ):
        data = opened(**arguments)
        data.load_state_dict(json.loads(json.dumps(saved)))
        with pytest.raises(ConfigError, match="the checkpoint is of other training data") as error:
            data.train_dataloader()
        now = data.state_dict()
        for name in ("seed", "fingerprint", "mix"):
            shown = f"{name} {saved[name]} there, {now[name]} here"
            assert (shown in error.value.what) == (name in unlike)
    older = opened()
    older.load_state_dict({"epoch": 0, "sample": 8, "seed": 0})
    with pytest.raises(ConfigError, match="version None there, 1 here"):
        older.train_dataloader()
    renamed = opened(train={"other name": SourceConfig(folder, weight=7, tasks=["t2i"])})
    renamed.load_state_dict(saved)
    renamed.train_dataloader()  # the same samples in the same order

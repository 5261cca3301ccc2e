"""Packs in place of batches: what is in them, and that ranks, workers and restarts change nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from recording import Recorder, StopAfter, attach, keys_in, make_trainer, read_rows

from bernini.conversation import Conversation, Media, Message
from bernini.errors import ConfigError
from datamodules import VideoDataModule
from datamodules.buckets import Bounds, tokens
from datamodules.loading import Clips
from datamodules.mixing import SourceConfig
from datamodules.packed_order import PackConfig
from datamodules.shards import Shards, write_shards

COUNT, BUDGET = 70, 24
PACK = PackConfig(tokens=BUDGET, window=3)


def images(count: int, prefix: str) -> Iterator[Conversation]:
    """Images of 1 to 12 tokens, whose keys tell their number."""
    for number in range(count):
        size = 1 + number * 7 % 12
        messages = [
            Message("text", text=f"{number}"),
            Message("image_gen", media=Media(pixels=torch.zeros(3, 1, 16, 16 * size, dtype=torch.uint8))),
        ]
        yield Conversation("t2i", messages, key=f"{prefix}{number:02d}-{size}")


def size_of(key: str) -> int:
    return int(key.partition("-")[2])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceConfig]:
    root = tmp_path_factory.mktemp("packs")
    for name, count in (("a", COUNT - 15), ("b", 15)):
        write_shards(images(count, name), root / name, samples_per_shard=9)
    return {"a": SourceConfig(str(root / "a"), 3), "b": SourceConfig(str(root / "b"), 1)}


def packs(data: VideoDataModule, count: int) -> list[list[str]]:
    """Keys of so many packs of a rank, which are then committed."""
    found: list[list[str]] = []
    while len(found) < count:
        for batch in data.train_dataloader():
            found.append([sample.key for sample in batch.samples])
            data.commit(batch.cursor)
            if len(found) == count:
                break
    return found


@pytest.mark.parametrize(("ranks", "accumulate", "workers"), [(2, 2, 0), (4, 1, 0), (2, 2, 2)])
def test_steps_are_the_same_at_any_number_of_ranks_and_workers(sources, ranks, accumulate, workers) -> None:
    one = packs(attach(VideoDataModule(train=sources, seed=3, pack=PACK), accumulate=4), 48)
    assert all(sum(map(size_of, keys)) <= BUDGET for keys in one)
    assert len({len(keys) for keys in one}) > 1, "packs hold as many as fit"
    found = []
    for rank in range(ranks):
        data = VideoDataModule(train=sources, seed=3, pack=PACK, workers=workers if rank == 0 else 0)
        found.append(packs(attach(data, rank, ranks, accumulate), 48 // ranks))
    assert [keys for batch in zip(*found, strict=True) for keys in batch] == one


def test_no_sample_is_lost_or_repeated(sources) -> None:
    """Of sources that are each gone through again and again, every sample comes as often as any other, or once more."""
    data = attach(VideoDataModule(train={"a": sources["a"]}, seed=3, pack=PACK), accumulate=2)
    data.train_dataloader()
    keys: list[str] = []
    while data.cursor["epoch"] < 6:
        keys += (pack := packs(data, 1)[0])
        assert len(keys) == data.cursor["epoch"] * (COUNT - 15) + data.cursor["sample"], pack
    counts = [keys.count(key) for key in set(keys)]
    assert len(counts) == COUNT - 15 and set(counts) <= {5, 6, 7}, "a window may reach into the next pass"


@pytest.mark.parametrize("restarts", [[5], [2, 7, 8, 15]])
def test_a_run_goes_on_with_the_next_pack(sources, tmp_path: Path, restarts: list[int]) -> None:
    """From checkpoints in windows, at their ends and at the ends of Lightning's epochs, and then on two ranks."""

    def fit(more: int, root: Path, path: Path | None, ranks: int = 1) -> list[list[str]]:
        root.mkdir()
        saving = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        model, kwargs = Recorder(root / "log"), {"devices": ranks, "strategy": "ddp_fork" if ranks > 1 else "auto"}
        data = VideoDataModule(train=sources, seed=3, pack=PACK)
        run = make_trainer(
            max_steps=18,
            accumulate_grad_batches=2 // ranks,
            enable_checkpointing=True,
            callbacks=[saving, StopAfter(more * 2 // ranks)],
            **kwargs,
        )
        run.fit(model, data, ckpt_path=path, weights_only=path and False)
        rows = [keys_in(read_rows(root / "log", rank)) for rank in range(ranks)]
        return [keys for batch in zip(*rows, strict=True) for keys in batch]

    whole = fit(18, tmp_path / "whole", None)
    trained: list[list[str]] = []
    path, done = None, 0
    for number, steps in enumerate([*restarts, 18]):
        root = tmp_path / str(number)
        trained += fit(steps - done, root, path, 2 if number == len(restarts) else 1)
        path, done = root / f"step={steps}.ckpt", steps
    assert trained == whole and len(whole) == 36


def test_how_full_and_even_packs_are_is_measured(sources) -> None:
    data = attach(VideoDataModule(train=sources, seed=3, pack=PACK), accumulate=2)
    for _ in range(12):
        step = packs(data, 2)
        sizes = [sum(map(size_of, keys)) for keys in step]
        measures = data.measures()
        assert measures["data/tokens"] == sum(sizes)
        assert measures["data/padding"] == pytest.approx(1 - sum(sizes) / (2 * BUDGET))
        assert 0 <= measures["data/cost_spread"] < 1 and "data/share/b" in measures


def test_what_does_not_fit_is_refused(sources) -> None:
    def use(accumulate: int = 2, **options: Any) -> VideoDataModule:
        data = attach(VideoDataModule(**{"train": sources, "seed": 3, "pack": PACK, **options}), accumulate=accumulate)
        data.train_dataloader()
        return data

    for options, message in (
        ({"batch_size": 2}, "batch_size is 2"),
        ({"pack": PackConfig(11)}, "samples have 1 to 12 tokens, a pack takes 11"),
        ({"pack": PackConfig(10_000)}, "but a step takes 2 packs of 10000"),
    ):
        with pytest.raises(ConfigError, match=message):
            use(**options)
    with pytest.raises(ConfigError, match=r"tokens, window and crossover"):
        PackConfig(0)
    saved = use().state_dict()
    assert len(json.dumps(saved)) < 1024
    for accumulate, options in ((2, {"pack": None}), (4, {}), (2, {"max_edge": 64}), (2, {"pack": PackConfig(25, 3)})):
        data = VideoDataModule(**{"train": sources, "seed": 3, "pack": PACK, **options})
        data.load_state_dict(saved)
        attach(data, accumulate=accumulate)
        with pytest.raises(ConfigError, match="the checkpoint is of other training data: packing"):
            data.train_dataloader()


@pytest.mark.parametrize("bounds", [Bounds(), Bounds(max_frames=5, max_edge=32)])
def test_tokens_are_those_of_what_is_read(shards: Path, bounds: Bounds) -> None:
    clips = Clips({"all": SourceConfig(str(shards))}, None, None, True, bounds)
    counted = clips.count_tokens()
    for number, (folder, at) in enumerate(clips.samples):
        shapes = [media.pixels.shape[1:] for media in folder.read(at, bounds).media()]
        assert counted[number] == sum(tokens(*shape) for shape in shapes) > 0


def test_tokens_of_posteriors_are_theirs_whatever_the_bounds(tmp_path: Path) -> None:
    shapes = [(3, 4, 6), (1, 8, 10)]
    posteriors = [Media(posterior=torch.zeros(32, *shape), fps=8.0) for shape in shapes]
    messages = [Message("text", text="a"), Message("image", media=posteriors[1])]
    write_shards([Conversation("i2v", [*messages, Message("video_gen", media=posteriors[0])])], tmp_path)
    clips = Clips({"all": SourceConfig(str(tmp_path))}, None, None, True, Bounds(max_frames=5, max_edge=32))
    assert clips.count_tokens().tolist() == [sum(t * h * w // 4 for t, h, w in shapes)]


def test_what_takes_the_place_of_a_bad_sample_is_no_longer(sources, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(images(24, "x"), folder)
    shard = folder / "shard-000000.tar"
    bad = [entry for entry in Shards(folder).entries if size_of(entry.key) in (3, 12)]
    with shard.open("r+b") as file:
        for entry in bad:
            file.seek(entry.members["i0.png"].at)
            file.write(bytes(8))
    data = attach(VideoDataModule(train=str(folder), seed=3, pack=PACK, max_bad_share=1.0))
    batches = list(data.train_dataloader())
    assert {row["key"] for batch in batches for row in batch.bad} == {entry.key for entry in bad}
    assert all(size_of(row["replaced_by"]) <= size_of(row["key"]) for batch in batches for row in batch.bad)
    assert all(sum(size_of(sample.key) for sample in batch.samples) <= BUDGET for batch in batches)

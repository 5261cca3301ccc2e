"""The order of samples: what it depends on, what it leaves out, and what it does not depend on."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recording import attach, make_shards

from bernini.errors import ConfigError
from datamodules import VideoDataModule
from datamodules.mixing import SourceConfig
from datamodules.order import Shuffled, eval_requests, permutation, train_requests
from datamodules.scanning import index_folder


@given(seed=st.integers(0, 2**31), epoch=st.integers(0, 1000), size=st.integers(1, 300))
def test_permutation(seed: int, epoch: int, size: int) -> None:
    order = permutation(seed, epoch, size).tolist()
    assert sorted(order) == list(range(size))
    assert order == permutation(seed, epoch, size).tolist()
    if size > 20:
        assert order != permutation(seed, epoch + 1, size).tolist() != permutation(seed + 1, epoch + 1, size).tolist()


@given(
    shards=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    window=st.integers(1, 14),
    first=st.integers(0, 100),
)
def test_every_pass_is_a_permutation_made_of_windows_of_shards(shards: list[int], window: int, first: int) -> None:
    order = Shuffled(shards, window, seed=3, key=(7,), first=first)
    size = sum(shards)
    owner = np.repeat(range(len(shards)), shards)
    for epoch in range(3):
        read = [order[epoch * size + place] for place in range(size)]
        assert sorted(read) == list(range(first, first + size))
        opened = [int(owner[number - first]) for number in read]
        at_a_time = {shard: [i for i, owned in enumerate(opened) if owned == shard] for shard in set(opened)}
        for place in range(size):
            assert sum(places[0] <= place <= places[-1] for places in at_a_time.values()) <= window
    anywhere = [order[place] for place in reversed(range(2 * size))]
    assert anywhere[::-1] == [Shuffled(shards, window, 3, (7,), first)[place] for place in range(2 * size)]


def test_order_depends_on_seed_epoch_and_data() -> None:
    shards = [10] * 8
    orders = [Shuffled(shards, 2, *key) for key in ((0, (1,)), (1, (1,)), (0, (2,)))]
    rows = [[order[place] for place in range(80)] for order in orders]
    rows.append([orders[0][place] for place in range(80, 160)])
    assert len({tuple(row) for row in rows}) == len(rows)


@given(
    size=st.integers(1, 200),
    shape=st.sampled_from([(1, 1), (4, 1), (2, 2), (1, 4), (3, 2)]),
    start=st.integers(0, 500),
)
def test_train_requests(size: int, shape: tuple[int, int], start: int) -> None:
    batch_size, world = shape
    step, order, cursor = batch_size * world, range(1000, 10000), {"epoch": start // size, "sample": start % size}
    length = max(1, size // step)
    ranks = [list(train_requests(order, cursor, size, length, batch_size, rank, world)) for rank in range(world)]
    together = [[n for request in row for n in request.samples] for row in zip(*ranks, strict=True)]
    flat = [n for row in together for n in row]
    assert flat == list(order[start : start + len(flat)]), "ranks side by side are the global order"
    assert 1 <= len(together) <= length and (start // step + len(together)) % length == 0, "to the end of its epoch"
    for number, row in enumerate(zip(*ranks, strict=True), 1):
        after = start + number * step
        assert all(request.cursor == {"epoch": after // size, "sample": after % size} for request in row)


@given(size=st.integers(1, 100), batch_size=st.integers(1, 5), world=st.integers(1, 5))
def test_eval_requests(size: int, batch_size: int, world: int) -> None:
    ranks = [eval_requests(size, batch_size, rank, world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    steps = zip(*ranks, strict=True)
    real = [n for step in steps for request in step for n in request.samples[: len(request.samples) - request.padding]]
    assert real == list(range(size))
    assert all(request.samples for rank in ranks for request in rank)


SIZE, STEP = 83, 8
SHAPES = [(1, 0), (1, 4), (2, 2), (4, 1), (8, 0)]  # ranks and workers


def steps_of(state: dict, ranks: int, workers: int, accumulate: int, count: int, **arguments) -> tuple[list, dict]:
    """What the next ``count`` optimizer steps train on, over all ranks, and the state after them."""
    made = {"batch_size": STEP // ranks // accumulate, "workers": workers, "seed": 4, **arguments}
    parts = [attach(VideoDataModule(**made), rank, ranks, accumulate) for rank in range(ranks)]
    for part in parts:
        part.load_state_dict(json.loads(json.dumps(state)))
    steps: list[list[str]] = []
    step: list[str] = []
    while True:  # epoch by epoch, as Lightning does
        for rows in zip(*(part.train_dataloader() for part in parts), strict=True):
            step += [sample.key for row in rows for sample in row.samples]
            if len(step) == STEP:
                steps, step = [*steps, step], []
                for part in parts:
                    part.commit(rows[0].cursor)
                if len(steps) == count:
                    return steps, parts[0].state_dict()


@pytest.mark.parametrize("mixed", [False, True])
def test_ranks_workers_and_accumulation_change_in_mid_epoch_and_the_global_batches_do_not(
    tmp_path: Path, mixed: bool
) -> None:
    clips, images = make_shards(tmp_path / "clips", SIZE), make_shards(tmp_path / "images", 9, prefix="i")
    train = {"a": SourceConfig(clips, 3), "b": SourceConfig(images, {0: 1, 100: 0})} if mixed else clips
    fresh = attach(VideoDataModule(train=train, seed=4)).state_dict()
    whole, _ = steps_of(fresh, 1, 0, 1, 32, train=train)
    for shape in SHAPES[1:]:
        assert steps_of(fresh, *shape, 1, 12, train=train)[0] == whole[:12], shape
    assert steps_of(fresh, 2, 0, 4, 12, train=train)[0] == whole[:12], "accumulation is part of a global batch"
    for turn in range(0, len(SHAPES), 3 if mixed else 1):
        state, steps = fresh, []
        for (ranks, workers), count in zip(SHAPES[turn:] + SHAPES[:turn], [3, 4, 2, 13, 10], strict=True):
            more, state = steps_of(state, ranks, workers, 2 if ranks == 2 else 1, count, train=train)
            steps += more
        assert steps == whole
    if not mixed:
        keys = [key for step in whole for key in step]
        for first in range(0, len(keys) - SIZE, SIZE):
            assert len(set(keys[first : first + SIZE])) == SIZE, "0 lost, 0 repeated"


def test_another_global_batch_goes_on_at_the_same_sample(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "clips", SIZE)
    first = attach(VideoDataModule(train=folder, batch_size=8))
    whole = [s.key for batch in first.train_dataloader() for s in batch.samples]
    first.commit({"epoch": 0, "sample": 24})
    second = attach(VideoDataModule(train=folder, batch_size=5))
    second.load_state_dict(first.state_dict())
    rest = [s.key for batch in second.train_dataloader() for s in batch.samples]
    assert rest[: len(whole) - 24] == whole[24 : 24 + len(rest)]


def empty_shard(folder: Path) -> None:
    """A folder with a tar without members."""
    folder.mkdir(exist_ok=True)
    (folder / "shard-000000.tar").write_bytes(bytes(10240))
    index_folder(folder)


@pytest.mark.parametrize(("shards", "ranks"), [([1] * 7, 3), ([13, 1, 1], 2), ([2, 0, 5], 4), ([0, 9], 1)])
def test_uneven_tiny_and_empty_shards_give_every_rank_as_many_batches(
    tmp_path: Path, shards: list[int], ranks: int
) -> None:
    for number, count in enumerate(shards):
        if count:
            make_shards(tmp_path / str(number), count, prefix=f"s{number}-", samples_per_shard=count)
        else:
            empty_shard(tmp_path / str(number))
    data = [
        attach(
            VideoDataModule(train=[str(tmp_path / str(n)) for n in range(len(shards))], workers=workers), rank, ranks
        )
        for rank, workers in zip(range(ranks), [2, 0, 1, 0], strict=False)
    ]
    loaders = [part.train_dataloader() for part in data]
    trained = [[s.key for batch in loader for s in batch.samples] for loader in loaders]
    assert {len(keys) for keys in trained} == {len(loader) for loader in loaders} == {sum(shards) // ranks}
    assert len({key for keys in trained for key in keys}) == sum(shards) // ranks * ranks


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fewer_samples_than_a_global_batch_is_an_error(tmp_path: Path, accumulate: int) -> None:
    folder = make_shards(tmp_path / "clips", 7)
    data = attach(VideoDataModule(train=folder, batch_size=4 // accumulate), 0, 2, accumulate)
    with pytest.raises(ConfigError, match="7 training samples, but a global batch takes 8") as error:
        data.train_dataloader()
    assert error.value.why == f"2 rank(s) take {4 // accumulate} each, {accumulate} time(s) a step"


def test_shards_without_any_sample_are_an_error(tmp_path: Path) -> None:
    empty_shard(tmp_path)
    with pytest.raises(ConfigError, match="the shards hold no sample"):
        attach(VideoDataModule(train=str(tmp_path)))

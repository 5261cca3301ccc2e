"""Items, intervals, tables and records: what does not need a model."""

import json
import math
import multiprocessing
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality.folder import Journal, RunFolder, Shard, describe, read_output
from benchmarks.quality.interface import Cell, coverage, interval, subset
from benchmarks.quality.official.five import FiVE
from benchmarks.quality.records import Records
from benchmarks.quality.scoring import judge_file, within
from benchmarks.quality.toy import ToyBenchmark
from bernini.errors import ConfigError, DataError
from bernini.media import write_image, write_video
from bernini.tasks import TASKS
from datamodules.toyworld import judge

BENCHMARK = ToyBenchmark(per_task=3, frames=9, size=64)
ITEMS = BENCHMARK.items()
SCORES = {(item.id, metric): (7 * n % 11) / 10 for n, item in enumerate(ITEMS) for metric in item.metrics}


# -- the toy benchmark --------------------------------------------------------------------------------------------


def test_items_are_those_of_the_toy_world_and_get_the_scores_that_the_verifier_gives() -> None:
    assert Counter(item.task for item in ITEMS) == dict.fromkeys(TASKS, 3)
    assert len({item.id for item in ITEMS}) == len(ITEMS)
    for item in ITEMS:
        sample = BENCHMARK.conversation(item).check()
        target = sample.targets[0].media
        assert (sample.key, sample.prompt, sample.info["truth"]) == (item.id, item.prompt, item.extra["truth"])
        assert (item.expect.frames, item.expect.fps) == (target.pixels.shape[1], target.fps)
        found = BENCHMARK.score(item, target.pixels)
        assert found == judge(sample, target.pixels)
        assert set(found) == set(item.metrics) <= set(BENCHMARK.metrics)
        assert set(found.values()) == {1.0}


def test_the_same_settings_give_the_same_items_also_by_way_of_json() -> None:
    again = ToyBenchmark(**json.loads(json.dumps(BENCHMARK.settings())))
    assert again == BENCHMARK and again.items() == ITEMS
    assert describe(again, ITEMS, len(ITEMS)) == describe(BENCHMARK, ITEMS, len(ITEMS))
    other = replace(BENCHMARK, seed=1)
    assert describe(other, other.items(), 36)["items"] != describe(BENCHMARK, ITEMS, 36)["items"]


@pytest.mark.parametrize(
    "wrong", [{"tasks": ()}, {"tasks": ("v2v", "v2v")}, {"tasks": ("v3v",)}, {"per_task": 0}, {"edits": ("fly",)}]
)
def test_settings_without_a_meaning_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        ToyBenchmark(**wrong).items()


def test_edit_kinds_can_be_chosen() -> None:
    chosen = ToyBenchmark(tasks=("v2v",), per_task=5, edits=("recolour",)).items()
    assert {item.category for item in chosen} == {"recolour"}


def test_what_a_file_keeps_is_what_counts(tmp_path: Path) -> None:
    """A true target scores fully by way of its MP4 or PNG; what is not as expected is refused with the reason."""
    for item in (ITEMS[0], next(i for i in ITEMS if i.task == "v2v")):
        folder = RunFolder(tmp_path)
        path, pixels = folder.output(BENCHMARK, item), BENCHMARK.conversation(item).targets[0].media.pixels
        assert "does not exist" in judge_file(BENCHMARK, tmp_path, item)[1]
        write_video(path, pixels, item.expect.fps) if path.suffix == ".mp4" else write_image(path, pixels)
        assert judge_file(BENCHMARK, tmp_path, item) == (item, dict.fromkeys(item.metrics, 1.0))
        larger = replace(item, expect=replace(item.expect, height=72))
        with pytest.raises(DataError, match="72"):
            read_output(path, larger)


# -- figures ------------------------------------------------------------------------------------------------------


def test_the_interval_is_wilsons() -> None:
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert interval(right / n, n) == pytest.approx((low, high), abs=5e-5)


@given(st.floats(0, 1), st.integers(1, 10_000))
def test_an_interval_holds_its_mean_and_narrows(mean: float, n: int) -> None:
    low, high = interval(mean, n)
    assert 0 <= low <= mean + 1e-12 and mean - 1e-12 <= high <= 1
    again = interval(mean, 4 * n)
    assert again[1] - again[0] < high - low


@given(st.permutations(sorted(SCORES)))
@settings(max_examples=20)
def test_a_table_does_not_depend_on_the_order_of_scores(order: list[tuple[str, str]]) -> None:
    table = BENCHMARK.aggregate(ITEMS, SCORES)
    assert BENCHMARK.aggregate(ITEMS, {key: SCORES[key] for key in order}) == table
    assert coverage(table) == 1
    v2v = [SCORES[item.id, "motion"] for item in ITEMS if item.task == "v2v"]
    (found,) = [c for c in table if (c.task, c.metric) == ("v2v", "motion")]
    assert found == Cell("v2v", "motion", math.fsum(v2v) / 3, *interval(math.fsum(v2v) / 3, 3), 3, 3)


def test_what_is_missing_lowers_the_coverage_and_is_no_zero() -> None:
    kept = {key: value for key, value in SCORES.items() if not key[0].startswith("t2i")}
    table = BENCHMARK.aggregate(ITEMS, kept)
    (empty,) = [c for c in table if c.task == "t2i"]
    assert (empty.value, empty.low, empty.high, empty.n, empty.of) == (None, 0, 1, 0, 3)
    assert coverage(table) == pytest.approx(len(kept) / len(SCORES))


@given(st.integers(1, 40))
def test_a_subset_is_even_over_tasks_and_grows_by_adding(limit: int) -> None:
    chosen = subset(ITEMS, limit)
    assert len(chosen) == min(limit, len(ITEMS)) and subset(list(reversed(ITEMS)), limit)[::-1] == chosen
    counts = Counter(item.task for item in chosen).values()
    assert max(counts) - (min(counts) if len(counts) == len(TASKS) else 0) <= 1
    assert {i.id for i in chosen} <= {i.id for i in subset(ITEMS, limit + 1)}


def test_seeds_are_the_items_own() -> None:
    seeds = [item.seed(42) for item in ITEMS]
    assert len({*seeds, ITEMS[0].seed(43), replace(ITEMS[0], repeat=1).seed(42)}) == len(ITEMS) + 2
    assert all(0 <= seed < 2**63 for seed in seeds)


# -- records over ranks -------------------------------------------------------------------------------------------


def _rank(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    records = Records(BENCHMARK, ITEMS)
    mine = [(one, metric, SCORES[one, metric]) for one, metric in sorted(SCORES, reverse=True)]
    # One rank has nothing, and one has items of the other too.
    records.update([[], mine[:50], mine[30:]][rank])
    Path(f"{out}-{rank}").write_text(repr(records.compute()))
    torch.distributed.destroy_process_group()


def test_any_number_of_ranks_gives_the_same_table_to_the_bit(tmp_path: Path) -> None:
    alone = Records(BENCHMARK, ITEMS)
    for (one, metric), value in SCORES.items():
        alone.update([(one, metric, value)])
    assert alone.compute() == BENCHMARK.aggregate(ITEMS, SCORES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks = [context.Process(target=_rank, args=(rank, port, str(tmp_path / "table"))) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert {(tmp_path / f"table-{rank}").read_text() for rank in range(3)} == {repr(alone.compute())}


def test_a_score_that_does_not_exist_for_an_item_is_not_asked_for() -> None:
    (one, metric), *_ = SCORES
    records = Records(BENCHMARK, ITEMS)
    records.update([(*key, None if key == (one, metric) else value) for key, value in SCORES.items()])
    cells, whole = records.compute(), BENCHMARK.aggregate(ITEMS, SCORES)
    changed = [(c.of, all_.of) for c, all_ in zip(cells, whole, strict=True) if c != all_]
    assert len(changed) == 1 and changed[0][0] == changed[0][1] - 1 and all(c.n == c.of for c in cells)


def test_a_score_is_in_its_range_and_exists_where_it_has_to() -> None:
    optional = "psnr_unedit_part"
    assert within(FiVE(), optional, None) is None and within(FiVE(), optional, math.inf) == math.inf
    for value in (math.nan, -0.1, 1.1):
        with pytest.raises(DataError, match="motion lies in"):
            within(BENCHMARK, "motion", value)
    with pytest.raises(DataError, match="motion is none"):
        within(BENCHMARK, "motion", None)


# -- the folder ---------------------------------------------------------------------------------------------------


def test_a_journal_survives_a_crash_and_is_one_over_all_shards(tmp_path: Path) -> None:
    whole = Journal(tmp_path / "motion.jsonl", Shard())
    whole.append([{"id": "a", "value": 1}, {"id": "b", "failed": "out of memory"}])
    with whole.file.open("a") as file:
        file.write('{"id": "c", "val')  # power went
    assert whole.rows() == {"a": {"id": "a", "value": 1}, "b": {"id": "b", "failed": "out of memory"}}
    whole.append([{"id": "c", "value": 0}])
    Journal(tmp_path / "motion.jsonl", Shard(1, 2)).append([{"id": "b", "value": 0.5}, {"id": "a", "failed": "later"}])
    Journal(tmp_path / "motion_blur.jsonl", Shard()).append([{"id": "z", "value": 1}])
    assert {key: row["value"] for key, row in whole.rows().items()} == {"a": 1, "b": 0.5, "c": 0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["motion.1of2.jsonl", "motion.jsonl", "motion_blur.jsonl"]
    whole.file.write_text("not json\n")
    with pytest.raises(DataError, match=r"motion\.jsonl, line 1"):
        whole.rows()


def test_a_folder_keeps_to_one_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match="bernini bench generate"):
        folder.manifest()
    told = {"model": {"transformer": "abc"}, "sampling": {"steps": 4, "modes": ("v2v",)}}
    folder.start(told, {"torch": "2.11"})
    folder.start(told, {"torch": "2.12"})
    assert folder.manifest()["environment"] == {"torch": "2.11"}
    with pytest.raises(ConfigError, match=r"sampling\.steps is 4 there and 5 here"):
        folder.start({**told, "sampling": {**told["sampling"], "steps": 5}}, {})
    with pytest.raises(ConfigError, match="not a benchmark's folder"):
        RunFolder(tmp_path).start(told, {})


@given(st.integers(0, 50), st.integers(1, 7))
def test_shards_are_the_whole(count: int, shards: int) -> None:
    parts = [list(Shard(index, shards).of(range(count))) for index in range(shards)]
    assert sorted(n for part in parts for n in part) == list(range(count))
    with pytest.raises(ConfigError, match="no shard"):
        Shard(shards, shards)


def test_a_folder_of_before_is_gone_on_with(tmp_path: Path) -> None:
    """Manifests did not always tell where data lie; what they compare is the same."""
    folder, identity = RunFolder(tmp_path / "run"), describe(BENCHMARK, ITEMS, len(ITEMS))
    folder.start(identity, {})
    told = json.loads((tmp_path / "run" / "manifest.json").read_text())
    del told["located"]
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(told))
    folder.start(identity, {}, BENCHMARK.located())
    assert folder.manifest()["located"] == {}

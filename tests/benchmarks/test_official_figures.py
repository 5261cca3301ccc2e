"""Official figures of whole runs: every benchmark that has a total gets it from its items' scores."""

from pathlib import Path

import pytest
from official_files import WRITERS

from benchmarks.quality.beside import printed
from benchmarks.quality.interface import Benchmark, Item
from benchmarks.quality.official.registry import OFFICIAL
from benchmarks.quality.tallying import tally
from benchmarks.quality.totals import vbench, vbench2, vbench_i2v
from benchmarks.quality.totals.records import SHARE, Compute, Facts

NAMED = {
    "vbench": ("VBench 1.0", "total"),
    "vbench_i2v": ("VBench-I2V", "total"),
    "vbench2": ("VBench-2.0", "total"),
    "editverse": ("EditVerseBench", "dino_tc"),
    "five": ("FiVE", "dist_e3"),
    "openve": ("OpenVE-Bench", "overall (8 types)"),
    "gedit": ("GEdit-Bench, en", "G_O"),
    "geneval": ("GenEval", "overall"),
    "dpg": ("DPG-Bench", "overall"),
}


def official(name: str, root: Path) -> tuple[Benchmark, list[Item]]:
    WRITERS[name](root)
    benchmark = OFFICIAL[name](root=str(root), accept_licence=True)
    return benchmark, list(benchmark.items())


def scores(benchmark: Benchmark, items: list[Item]) -> dict[tuple[str, str], float | None]:
    """For each item what it is asked for: 1, or what is nearest to it in the score's range."""
    ranges = {name: benchmark.ranges.get(name, SHARE) for name in benchmark.metrics}
    return {(i.id, name): min(max(1.0, ranges[name].low), ranges[name].high) for i in items for name in i.metrics}


@pytest.mark.parametrize("name", NAMED)
def test_a_whole_run_has_its_figures_and_one_that_lacks_a_score_has_fewer(name: str, tmp_path: Path) -> None:
    benchmark, items = official(name, tmp_path)
    values = scores(benchmark, items)
    found = tally(benchmark.tallies(items), values, True)
    title, figure = NAMED[name]
    assert all(total["figures"] and total["why"] == "" for total in found)
    (total,) = [one for one in found if one["title"] == title]
    assert figure in {row["figure"] for row in total["figures"]}
    for table in printed(total):
        assert {row["figure"] for row in total["figures"]} & set(table.decimals), "its columns have the same names"
    del values[next(iter(values))]
    fewer = tally(benchmark.tallies(items), values, True)
    assert sum(len(one["figures"]) for one in fewer) < sum(len(one["figures"]) for one in found)
    assert all(one["figures"] or "is missing" in one["why"] for one in fewer)


@pytest.mark.parametrize(
    ("name", "compute"), [("vbench", vbench.totals), ("vbench_i2v", vbench_i2v.totals), ("vbench2", vbench2.totals)]
)
def test_vbench_is_printed_in_per_cent(name: str, compute: Compute, tmp_path: Path) -> None:
    benchmark, items = official(name, tmp_path)
    values = {key: 0.01 * (n % 90) for n, key in enumerate(scores(benchmark, items))}
    (total,) = tally(benchmark.tallies(items), values, True)
    facts = {item.id: Facts(item.metrics, item.category, item.expect.frames) for item in items}
    records = {item.id: {metric: values[item.id, metric] for metric in item.metrics} for item in items}
    expected = compute(records, facts)
    assert {row["figure"]: (row["value"], row["n"]) for row in total["figures"]} == {
        figure: (pytest.approx(100 * value), n) for figure, (value, n) in expected.items()
    }

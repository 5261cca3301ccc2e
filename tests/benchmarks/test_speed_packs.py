import json
from dataclasses import replace

import pytest
import torch

from benchmarks.speed.mixed import TASKS, Maker, draw_mix, packs, padded, take
from benchmarks.speed.packs import Trainee, main, measure
from benchmarks.speed.protocol import Sample
from benchmarks.speed.renderer import MODELS
from bernini.errors import ConfigError
from bernini.renderer.packing import pack
from datamodules.buckets import Bounds
from datamodules.packed_order import PackConfig

BUDGET = 300
SMALL = "--device cpu --model tiny --max-frames 33 --max-area 4096 --samples 200 --ranks 2 --steps 2 --warmup 1"


@pytest.fixture
def mix():
    return draw_mix(200, Bounds(max_frames=33, max_area=4096), seed=0)


def test_the_mix_is_of_all_tasks_and_fits_480p_and_81_frames():
    mix = draw_mix(500, Bounds(max_frames=81, max_area=399_360), seed=0)
    assert {sample.task for sample in mix} == {*TASKS}
    assert min(sample.tokens for sample in mix) <= 1560 and max(sample.tokens for sample in mix) == 65_520
    assert all(len(sample.sources) == (sample.task[0] != "t") for sample in mix if sample.task != "r2v")


def test_packs_and_padded_batches_stay_within_one_budget(mix):
    own, rival = take(packs(mix, PackConfig(BUDGET), 2, 0), 20), take(padded(mix, BUDGET, 0), 20)
    assert all(group.real <= BUDGET and not group.length for group in own)
    assert all(group.length == max(s.tokens for s in group.samples) for group in rival)
    assert all(group.length * len(group.samples) <= BUDGET for group in rival)
    assert sum(group.real for group in own) > 1.2 * sum(group.real for group in rival)
    with pytest.raises(ConfigError, match="--samples"):
        take(padded(mix, BUDGET, 0), 1000)


def test_samples_are_as_long_as_they_are_said_to_be(mix):
    maker = Maker(16, torch.zeros(3, 32), seed=0)
    for group in (*take(packs(mix, PackConfig(BUDGET), 1, 0), 5), *take(padded(mix, BUDGET, 0), 5)):
        packed = pack(maker.samples(group), (1, 2, 2))
        assert sorted(packed.token_lengths) == sorted(group.length or sample.tokens for sample in group.samples)


def test_a_pack_that_leaks_is_not_timed(mix, monkeypatch):
    trainee = Trainee(MODELS["tiny"], "auto", None, torch.device("cpu"))
    group = max(take(packs(mix, PackConfig(BUDGET), 1, 0), 5), key=lambda own: len({s.tokens for s in own.samples}))
    assert trainee.check(group) < 2e-2

    def leaky(samples, patch):  # the first sample ends within another
        packed = pack(samples, patch)
        return replace(packed, token_lengths=packed.token_lengths[::-1])

    monkeypatch.setattr("benchmarks.speed.packs.pack", leaky)
    with pytest.raises(RuntimeError, match="a sample in a pack is off by"):
        trainee.check(group)


def test_ranks_wait_for_the_slowest(mix):
    groups = take(padded(mix, BUDGET, 0), 4)
    real = sum(group.real for group in groups)
    first, second = ([Sample(ms, 2**30) for ms in times] for times in ((400, 100, 100, 300), (100, 100, 100, 300)))
    row = measure(groups, first, second, BUDGET, ranks=2)
    assert row["tokens_per_s"] == pytest.approx(real / 0.6)
    assert row["tokens_per_s_of_ranks"] == pytest.approx(real / 0.4)
    assert row["slower_at_first"] == 1
    assert row["spread"] == pytest.approx((0 + 0.5) / 2)
    assert row["filled"] == pytest.approx(real / BUDGET / 4)


def test_the_command_checks_times_and_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "speed" / "packs.json"
    figures = main(
        [*SMALL.split(), "--tokens", str(BUDGET), *["--backend", "eager", "--layers", "1", "--json"], str(path)]
    )
    written = json.loads(path.read_text())
    assert written["ratios"] == figures["ratios"]
    rows = written["contestants"]
    assert rows["packs"]["real"] == 1 and rows["packs"]["filled"] > rows["padded"]["filled"]
    for row in rows.values():
        assert row["tokens_per_s_of_ranks"] > row["tokens_per_s"] > 0
    assert f"{written['ratios']['tokens_per_s']:.2f} times the useful tokens" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--steps", "--ranks", "--samples"])
def test_counts_below_one_are_refused(option):
    with pytest.raises(ConfigError, match=f"{option} is 0"):
        main([*SMALL.split(), option, "0"])

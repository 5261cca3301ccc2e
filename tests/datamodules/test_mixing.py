"""Sources keep their shares at every moment, whatever the weights do, and a resumed run knows where each one is."""

import json
from pathlib import Path

import pytest
from factories import logged_rows
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from recording import Recorder, make_shards, make_trainer

from bernini.errors import ConfigError
from datamodules import VideoDataModule
from datamodules.mixing import Mix, SourceConfig, Weight

# The paper's stage II, whose pairs of neighbouring frames go to 0.
STAGE_2 = {"t2i": 31, "t2v": 42, "i2i": 4, "v2v": 0.4, "i2v": 0.4, "iv2v": 0.3}
STAGE_2 |= {"video_pairs": {0: 11, 6000: 0}, "image_pairs": {0: 11, 6000: 0}}
MIXES: dict[str, dict[str, Weight]] = {
    "three": {"a": 0.7, "b": 0.2, "c": 0.1},
    "stage 2": STAGE_2,
    "curriculum": {"a": 1, "b": {2000: 0, 3000: 5}, "c": {100: 0, 101: 30, 5000: 0.001}, "d": {0: 1, 1: 0}},
    "sixteen": {str(number): 1.7**number for number in range(16)},
}


def worst(mix: Mix, samples: int) -> float:
    """How far a source is from its share at most, at any moment; checks that the mix says the same in all its ways."""
    drawn, most = [0] * len(mix.names), 0.0
    for number in range(samples):
        source, place = mix.draw(number)
        assert place == drawn[source], "the samples of a source come in order"
        drawn[source] += 1
        most = max(most, *(abs(a - b) for a, b in zip(drawn, mix.asked(number + 1), strict=True)))
        assert number % 500 or drawn == mix.counts(number + 1)
    return most


@pytest.mark.parametrize("name", MIXES)
def test_every_source_is_within_two_samples_of_its_share_at_each_of_10000(name: str) -> None:
    assert worst(Mix(MIXES[name]), 10_000) <= 2


above_0 = st.floats(1e-3, 100)
schedule = st.dictionaries(st.integers(0, 300), st.one_of(st.just(0.0), above_0))
changing = st.builds(lambda weights, at, weight: {**weights, at: weight}, schedule, st.integers(0, 300), above_0)


@settings(max_examples=50)
@given(st.lists(st.one_of(above_0, changing), min_size=1, max_size=16))
def test_any_weights_that_change_in_any_way(weights: list[Weight]) -> None:
    try:
        mix = Mix({str(number): weight for number, weight in enumerate(weights)})
    except ConfigError:
        assume(False)
    assert worst(mix, 400) <= 0.5 * (len(weights) - 1).bit_length() + 1e-6


def test_shares_are_asked_for_as_the_area_under_the_lines() -> None:
    mix = Mix({"a": {0: 1, 100: 0}, "b": {0: 1, 100: 2}})  # a half to nothing, in a straight line
    for number in (1, 30, 99, 100, 250):
        part = min(number, 100)
        assert mix.asked(number) == pytest.approx([a := part * (1 - part / 200) / 2, number - a])
    assert mix.counts(100) == [25, 75] and all(mix.draw(number)[0] == 1 for number in range(100, 500))


def test_the_billionth_sample_is_found_as_fast_as_the_first_and_is_as_right() -> None:
    mix = Mix(STAGE_2)
    for start in (10**9, 10**12):
        drawn = mix.counts(start)
        for number in range(start, start + 1000):
            source, place = mix.draw(number)
            assert place == drawn[source]
            drawn[source] += 1
            assert max(abs(a - b) for a, b in zip(drawn, mix.asked(number + 1), strict=True)) <= 2


@pytest.mark.parametrize("wrong", [-1, float("nan"), 0, {0: 0, 5: 0}, {-1: 1}, {0: 1, 5: -1}])
def test_weights_that_are_none_are_refused_by_name(wrong: Weight) -> None:
    with pytest.raises(ConfigError, match="the weight of clips is") as error:
        Mix({"images": 1.0, "clips": wrong})
    assert error.value.where == "data.init_args.train.clips.weight"


def test_a_moment_without_any_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="all weights are 0 at sample 50"):
        Mix({"a": {0: 1, 50: 0}, "b": {50: 0, 60: 1}})


SIZES = {"a": 40, "b": 7, "c": 3}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceConfig]:
    """Three sources of unlike sizes; the last is gone through again and again, the second dries up."""
    root = tmp_path_factory.mktemp("sources")
    shards = {name: make_shards(root / name, size, prefix=name) for name, size in SIZES.items()}
    return {
        "a": SourceConfig(shards["a"], 0.7),
        "b": SourceConfig(shards["b"], {0: 0.2, 100: 0.2, 101: 0}),
        "c": SourceConfig(shards["c"], 0.1),
    }


def keys_of(data: VideoDataModule, samples: int) -> list[str]:
    """Keys of the next samples of a data module that hands out one at a time."""
    keys: list[str] = []
    while len(keys) < samples:
        for batch in data.train_dataloader():
            keys += [sample.key for sample in batch.samples]
            data.commit(batch.cursor)
            if len(keys) == samples:
                break
    return keys


def test_sources_wrap_into_epochs_of_their_own_and_resume_anywhere(sources: dict[str, SourceConfig]) -> None:
    data = VideoDataModule(train=sources)
    data.setup("fit")
    states, keys = [data.state_dict()], []
    for _ in range(50):
        keys += keys_of(data, 3)
        states.append(json.loads(json.dumps(data.state_dict())))
    for name, size in SIZES.items():
        mine = [key for key in keys if key[0] == name]
        for first in range(0, len(mine) - size, size):
            assert len(set(mine[first : first + size])) == size, "each once in an epoch of its own"
    assert len([key for key in keys if key[0] == "c"]) > 3 * SIZES["c"]
    assert "b" not in {key[0] for key in keys[105:]}
    for turn, state in enumerate(states[:-1]):
        resumed = VideoDataModule(train=sources)
        resumed.setup("fit")
        resumed.load_state_dict(state)
        assert keys_of(resumed, 3) == keys[3 * turn : 3 * turn + 3], f"resumed after {3 * turn} samples"


def test_tasks_of_one_folder_are_mixed_as_sources(tmp_path: Path) -> None:
    both = [make_shards(tmp_path / "images", 23), make_shards(tmp_path / "clips", 7, "t2v", "v")]
    mixed = {"clips": SourceConfig(both, 2, ["t2v"]), "images": SourceConfig(both, 1, ["t2i"])}
    data = VideoDataModule(train=mixed, tasks=["v2v"])
    data.setup("fit")
    kinds = [key[0] for key in keys_of(data, 30)]
    assert kinds.count("v") == 20 and kinds[:6].count("v") == 4
    with pytest.raises(ConfigError, match="no sample of task v2v") as error:
        VideoDataModule(train={"edits": SourceConfig(both, tasks=["v2v"])}).setup("fit")
    assert error.value.where == ", ".join(both) and error.value.why == "the shards hold t2i, t2v"


def test_realised_shares_are_logged_beside_those_asked_for(sources: dict[str, SourceConfig], tmp_path: Path) -> None:
    model = Recorder()
    fit = make_trainer(max_steps=40, accumulate_grad_batches=2, log_every_n_steps=5, logger=CSVLogger(tmp_path))
    fit.fit(model, VideoDataModule(train=sources))
    rows = logged_rows(tmp_path, "data")
    assert [row["step"] for row in rows] == list(range(4, 40, 5))
    for row in rows:
        used = [keys[0] for keys in model.trained[: 2 * (int(row["step"]) + 1)]]
        for name, size in SIZES.items():
            count = sum(key[0] == name for key in used)
            assert row[f"data/share/{name}"] == pytest.approx(count / len(used))
            assert row[f"data/asked/{name}"] == pytest.approx(row[f"data/share/{name}"], abs=2 / len(used))
            assert row[f"data/epoch/{name}"] == pytest.approx(count / size)

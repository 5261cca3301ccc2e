import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bernini.errors import ConfigError, DataError
from datamodules.buckets import Bounds, tokens
from datamodules.packing import cost, pack_window

PAPER = {"t2i": 0.20, "t2v": 0.30, "i2i": 0.40, "v2v": 0.033, "i2v": 0.035, "rv2v": 0.032}  # Stage II'
SHAPES = {
    (720, 1280): 0.4,
    (1080, 1920): 0.25,
    (1280, 720): 0.12,
    (720, 960): 0.08,
    (1024, 1024): 0.08,
    (800, 1200): 0.07,
}


@given(
    frames=st.integers(1, 300),
    height=st.integers(16, 3000),
    width=st.integers(16, 3000),
    max_frames=st.none() | st.integers(1, 100),
    max_area=st.none() | st.sampled_from([65_536, 230_400, 399_360]),
    max_edge=st.none() | st.integers(64, 900),
)
def test_buckets(frames, height, width, max_frames, max_area, max_edge):
    bounds = Bounds(max_frames, max_edge, max_area)
    t, h, w = bounds.bucket(frames, height, width)
    assert t % 4 == 1 and t <= max(max_frames or 303, 1) and h * w <= (max_area or 3000**2)
    assert max(h, w) <= (max_edge or 3000)
    assert bounds.bucket(t, h, w) == (t, h, w), "what is within the bounds stays as it is"
    if (h, w) != (height, width):
        assert h % 16 == w % 16 == 0
        ideal = min(
            1.0, (max_area or 3000**2) ** 0.5 / (height * width) ** 0.5, (max_edge or 3000) / max(height, width)
        )
        if min(height, width) * ideal > 128:
            assert abs(math.log(h / w * width / height)) <= 16 / min(h, w), "less than a step of the shorter edge"
            assert h * w > 0.8 * height * width * ideal**2


def test_the_area_limit_takes_the_root():
    """The released preprocessing scales both edges by 230400 / area, and makes of this frame 144 x 256."""
    bounds = Bounds(max_frames=81, max_area=230_400)
    assert bounds.bucket(100, 720, 1280) == (81, 352, 640) and tokens(81, 352, 640) == 21 * 22 * 40
    assert Bounds(max_area=480 * 832).resized(720, 1280) == (480, 832)
    with pytest.raises(ConfigError, match="max_area 100 is smaller than 16"):
        Bounds(max_area=100)
    with pytest.raises(ConfigError, match="max_frames is 0"):
        Bounds(max_frames=0)


def test_cost_is_that_of_the_models_shape():
    d, f, n = 5120, 13_824, 32_760
    exact = (12 * d * d + 4 * d * f) * n + 4 * n * n * d
    per_token = 12 * d * d + 4 * d * f
    assert cost(np.array([n]))[0] == pytest.approx(exact / per_token)


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=8, max_size=120),
    budget=st.integers(1000, 3000),
    packs=st.sampled_from([1, 2, 8]),
)
def test_each_sample_is_in_one_pack_of_a_whole_step(sizes, budget, packs):
    steps = pack_window(sizes, budget, packs, (1, 2, 3))
    assert all(len(step.packs) == packs and all(step.packs) for step in steps)
    places = [place for step in steps for places in step.packs for place in places]
    assert len(set(places)) == len(places) and set(places) <= set(range(len(sizes)))
    if len(places) < len(sizes):
        assert len(sizes) - len(places) < packs
    for step in steps:
        assert step.tokens == [sum(sizes[place] for place in places) for places in step.packs]
        assert max(step.tokens) <= budget
        assert step.costs == pytest.approx([cost(np.array(sizes)[places]).sum() for places in step.packs])
    assert steps == pack_window(sizes, budget, packs, (1, 2, 3)), "the same window gives the same packs"


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(DataError, match="2 samples of up to 500 tokens do not fill 1 packs of 400"):
        pack_window([500, 3], 400, 1, (0, 0, 0))
    with pytest.raises(DataError, match="do not fill 4 packs"):
        pack_window([1, 2, 3], 400, 4, (0, 0, 0))


def drawn(count: int) -> list[int]:
    """Tokens of samples of the paper's mix at 480p: images and clips of 17 to 81 frames, of several shapes."""
    rng, bounds = np.random.default_rng(0), Bounds(max_frames=81, max_area=480 * 832)
    sizes = []
    for task in rng.choice(list(PAPER), count, p=list(PAPER.values())):
        height, width = list(SHAPES)[rng.choice(len(SHAPES), p=list(SHAPES.values()))]
        image = tokens(*bounds.bucket(1, height, width))
        clip = tokens(*bounds.bucket(17 + int(rng.gamma(6, 12)), height, width))
        parts = {"t2i": (1, 0), "t2v": (0, 1), "i2i": (2, 0), "v2v": (0, 2), "i2v": (1, 1), "rv2v": (1, 2)}
        sizes.append(parts[task][0] * image + parts[task][1] * clip)
    return sizes


@pytest.mark.parametrize(("packs", "budget"), [(8, 72_000), (8, 140_000), (64, 100_000)])
def test_the_papers_mix_fills_packs_of_equal_cost(packs, budget):
    sizes = drawn(30_000)
    window = int(64 * packs * budget / np.mean(sizes))  # some 64 steps
    filled, spread, slowest, mean = [], [], 0.0, 0.0
    for first in range(0, min(4 * window, len(sizes) - window), window):
        steps = pack_window(sizes[first : first + window], budget, packs, (0, 0, first))
        filled += [total / budget for step in steps for total in step.tokens]
        spread += [1 - min(step.costs) / max(step.costs) for step in steps]
        slowest += sum(max(step.costs) for step in steps)
        mean += sum(np.mean(step.costs) for step in steps)
    assert np.mean(filled) >= 0.97, "real tokens"
    assert np.mean(spread) <= 0.05 and np.quantile(spread, 0.9) <= 0.06, "between the ranks of a step"
    assert mean / slowest >= 0.98, "of the time, no rank waits for another"

"""Which frames each benchmark looks at."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality.metrics import frames
from bernini.errors import DataError

LENGTHS = st.integers(1, 300)


@pytest.mark.parametrize(
    ("n", "judged"),
    [(49, [0, 16, 32, 48]), (81, [0, 27, 54]), (82, [0, 27, 54, 81]), (5, [0, 1, 2, 3, 4]), (3, [0, 1, 2])],
)
def test_frames_that_editverse_judges(n: int, judged: list[int]) -> None:
    assert frames.editverse_judged(n, n) == judged == frames.editverse_judged(n, judged[-1] + 1)
    with pytest.raises(DataError, match=f"frame {judged[-1]} is judged"):
        frames.editverse_judged(n, judged[-1])


def test_frames_that_vbench_samples() -> None:
    assert frames.middle(49, 16) == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 37, 40, 43, 46]
    assert frames.middle(16, 16) == list(range(16))
    assert frames.middle(5, 8) == [0, 1, 2, 3, 4, 4, 4, 4]
    assert frames.middle(81, 8) == [4, 14, 24, 34, 44, 54, 64, 75]


@given(LENGTHS, st.integers(1, 40))
def test_middles_lie_apart_and_as_far_from_either_end(n: int, count: int) -> None:
    taken = frames.middle(n, count)
    assert len(taken) == count and taken == sorted(taken) and set(taken) <= set(range(n))
    assert len(set(taken)) == min(n, count)
    assert abs(taken[0] - (n - 1 - taken[-1])) <= 1


@pytest.mark.parametrize(
    ("fps", "interval"),
    [(4, 1), (8, 1), (11.9, 1), (12.1, 2), (16, 2), (20, 2), (23.976, 3), (24, 3), (25, 3), (28, 4), (30, 4), (60, 8)],
)
def test_dynamic_degree_takes_about_8_frames_per_second(fps: float, interval: int) -> None:
    assert frames.interval(fps) == interval
    assert frames.dynamic_degree(81, fps) == list(range(81))[::interval]


def test_frames_of_the_rest() -> None:
    assert frames.editverse_text(81) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert frames.editverse_text(4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert frames.evenly(81, 16) == [0, 5, 10, 16, 21, 26, 32, 37, 42, 48, 53, 58, 64, 69, 74, 80]
    assert frames.opens2v_judged(81) == list(range(0, 80, 5)) and frames.opens2v_judged(9) == list(range(9))
    assert frames.five_compared(41) == [0, 8, 16, 24, 32, 40]
    assert frames.five_judged(41) == [2, 6, 10, 14, 18, 22, 26, 30, 34, 38]
    assert frames.five_judged(8) == [2, 6] and frames.five_judged(4) == [2]
    with pytest.raises(DataError, match="at least 4"):
        frames.five_judged(3)


def test_windows_for_smoothness() -> None:
    assert frames.windows(4) == [[0, 0, 0], [0, 1, 2], [1, 2, 3], [2, 2, 3]]
    assert frames.windows(2) == [[0, 0, 0], [0, 1, 1]] and frames.windows(1) == [[0, 0, 0]]


@given(LENGTHS, st.sampled_from([3, 5]))
def test_each_frame_has_a_window_that_holds_it(n: int, size: int) -> None:
    found = frames.windows(n, size)
    assert len(found) == n
    for middle, window in enumerate(found):
        assert len(window) == size and window == sorted(window) and window[0] >= 0 and window[-1] < n
        assert middle in window or middle < size // 2


def test_nothing_is_taken_of_nothing() -> None:
    for choose in (frames.editverse_text, frames.evenly, frames.windows, frames.five_compared):
        with pytest.raises(DataError, match="0 frames"):
            choose(0)

"""Working on tensors of equal shapes together, which must not show in the results."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bernini.stacking import by_shape, cut, group, map_stacked

SHAPES = st.lists(st.sampled_from([(2, 3), (3, 2), (6,), (1, 1, 4)]), max_size=9)


def draw(shapes: list[tuple[int, ...]], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@given(SHAPES, st.none() | st.integers(1, 20))
def test_the_result_is_that_of_row_by_row(shapes, at_once):
    left, right = draw(shapes), [x.flatten()[:2] for x in draw(shapes, 1)]
    calls = []

    def function(x: Tensor, y: Tensor) -> Tensor:
        calls.append(x.shape)
        return x.flatten(1).cumsum(1) * y[:, :1] + y[:, 1:]

    found = map_stacked(function, left, right, at_once=at_once)
    assert len(found) == len(shapes)
    for one, x, y in zip(found, left, right, strict=True):
        assert torch.equal(one, x.flatten().cumsum(0) * y[0] + y[1])
    assert sum(shape[0] for shape in calls) == len(shapes)
    if at_once is None:
        assert len(calls) == len(set(shapes))
    else:
        assert all(shape.numel() <= at_once or shape[0] == 1 for shape in calls)


def test_large_rows_go_alone_and_small_ones_together():
    sizes = []

    def function(x: Tensor) -> Tensor:
        sizes.append(tuple(x.shape))
        return x

    map_stacked(function, draw([(100,), (4,), (4,), (100,), (4,)]), at_once=10)
    assert sizes == [(1, 100), (1, 100), (2, 4), (1, 4)]


@given(st.lists(st.integers(0, 3)))
def test_groups_hold_every_position_once_in_order_of_appearance(keys):
    groups = group(keys)
    assert sorted(position for positions in groups for position in positions) == list(range(len(keys)))
    assert [keys[positions[0]] for positions in groups] == list(dict.fromkeys(keys))
    assert all(len({keys[position] for position in positions}) == 1 for positions in groups)


def test_shapes_are_what_groups_tensors():
    assert by_shape(draw([(2, 3), (3, 2), (2, 3), (6,)])) == [[0, 2], [1], [3]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12), st.none() | st.integers(1, 4))
def test_parts_are_as_full_as_they_may_be(sizes, most, count):
    parts = cut(sizes, most, count)
    assert [position for part in parts for position in part] == list(range(len(sizes)))
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        held = sum(sizes[position] for position in part)
        assert held <= most or len(part) == 1
        assert count is None or len(part) <= count
        assert after is None or held + sizes[after[0]] > most or len(part) == count

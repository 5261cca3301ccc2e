"""SA-3D RoPE against published numbers, an independent complex formulation and the properties that define it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bernini.rope.op import prepare_segments, sa3d_qk_norm_rope
from bernini.rope.reference import axis_dims, rotate, sa3d_angles

HEAD = 128


def table(*rows: tuple[int, int, int, float]) -> torch.Tensor:
    """Segment rows ``(start, T, H, W, id)`` from ``(T, H, W, id)``, float64."""
    start, out = 0, []
    for t, h, w, source_id in rows:
        out.append((start, t, h, w, source_id))
        start += t * h * w
    return torch.tensor(out, dtype=torch.float64)


def tokens_of(rows: torch.Tensor) -> int:
    return int((rows[:, 1] * rows[:, 2] * rows[:, 3]).sum())


def phases(grid: tuple[int, int, int], source_id: float, dim: int) -> np.ndarray:
    """``[tokens, dim / 2]`` unit complex numbers: the product of one 1-D RoPE per axis and a full-width one."""

    def rope(position, size):
        return np.exp(1j * np.asarray(position, float)[..., None] / 10000.0 ** (np.arange(0, size, 2) / size))

    side = 2 * (dim // 6)
    sizes = (dim - 2 * side, side, side)
    blocks = []
    for axis, size in enumerate(sizes):
        shape = [1, 1, 1, size // 2]
        shape[axis] = grid[axis]
        blocks.append(np.broadcast_to(rope(np.arange(grid[axis]), size).reshape(shape), (*grid, size // 2)))
    return np.concatenate(blocks, -1).reshape(-1, dim // 2) * rope(source_id, dim)


def angles_at(position: tuple[int, int, int], source_id: float, dim: int = HEAD) -> torch.Tensor:
    """Angles of the last token of the smallest segment that reaches a position."""
    t, h, w = (p + 1 for p in position)
    return sa3d_angles(table((t, h, w, source_id)), t * h * w, dim)[-1]


@pytest.mark.parametrize(
    ("position", "source_id", "expected"),
    [
        (
            (1, 2, 3),
            0,
            {0: 1, 1: 0.657933225, 21: 0.000151991, 22: 2, 23: 1.289893354, 42: 0.000310103, 43: 3, 44: 1.934840031}
            | {63: 0.000465155},
        ),
        (
            (1, 2, 3),
            1,
            {0: 2, 1: 1.523897548, 21: 0.048848744, 22: 2.04216965, 23: 1.326410767, 42: 0.002681477, 43: 3.002053525}
            | {44: 1.936618311, 63: 0.000580633},
        ),
        (
            (1, 2, 3),
            2,
            {0: 3, 1: 2.389861871, 21: 0.097545496, 22: 2.084339301, 23: 1.36292818, 42: 0.005052851, 43: 3.00410705}
            | {44: 1.93839659, 63: 0.000696111},
        ),
        ((1, 0, 0), 0, {0: 1, 1: 0.65793322, 2: 0.43287613, 3: 0.28480359, 21: 1.5199110830e-4}),
        ((0, 1, 0), 0, {22: 1, 23: 0.64494668, 24: 0.41595622, 25: 0.26826958, 42: 1.5505157798e-4}),
        ((0, 0, 1), 0, {43: 1, 44: 0.64494668, 45: 0.41595622, 46: 0.26826958, 63: 1.5505157798e-4}),
        (
            (0, 0, 0),
            1,
            {0: 1, 1: 0.86596432, 2: 0.74989421, 3: 0.64938163, 4: 0.56234133, 5: 0.48696753, 21: 0.04869675}
            | {22: 0.04216965, 23: 0.03651741, 42: 0.00237137, 43: 0.00205353, 44: 0.00177828, 63: 1.1547820e-4},
        ),
    ],
)
def test_angles_are_the_published_ones(position, source_id, expected):
    found = angles_at(position, source_id)
    assert {k: found[k].item() for k in expected} == pytest.approx(
        expected, abs=1e-8 if position != (1, 2, 3) else 1e-6
    )


def test_phase_of_source_one_covers_the_whole_head():
    segments = prepare_segments(table((1, 1, 1, 1.0)), 1, HEAD)
    k = [0, 1, 21, 22, 43, 63]
    cos = [0.540302306, 0.647905872, 0.998814547, 0.999110992, 0.999997892, 0.999999993]
    sin = [0.841470985, 0.761720408, 0.048677508, 0.042157153, 0.002053524, 0.000115478]
    for found, expected in zip(segments.constants, (cos, sin), strict=True):
        assert found[0, k].tolist() == pytest.approx(expected, abs=1e-6)


def test_rotated_ones_are_the_published_ones():
    angles = angles_at((1, 2, 3), 1)[None]
    pairs = rotate(torch.ones(1, 1, HEAD, dtype=torch.float64), angles.cos(), angles.sin())[0, 0].unflatten(0, (-1, 2))
    expected = {0: (-1.32544426, 0.49315059), 22: (-1.34505576, 0.43683522), 43: (-1.12936694, -0.85119346)}
    for k, pair in expected.items():
        assert pairs[k].tolist() == pytest.approx(pair, abs=1e-6)


@pytest.mark.parametrize(
    ("source_id", "cos", "sin"),
    [
        (0, 744.1059295623, 58.5128432103),
        (1, 711.4167465174, 133.4365541256),
        (1 + 4 / 7, 680.3218297413, 162.5108380123),
    ],
)
def test_sums_over_a_grid_are_the_published_ones(source_id, cos, sin):
    angles = sa3d_angles(table((2, 2, 3, source_id)), 12, HEAD)
    assert angles.cos().sum().item() == pytest.approx(cos, abs=1e-6)
    assert angles.sin().sum().item() == pytest.approx(sin, abs=1e-6)


def test_small_heads_split_the_same_way():
    assert axis_dims(128) == (44, 42, 42)
    assert axis_dims(16) == (8, 4, 4)
    angles = sa3d_angles(table((2, 2, 2, 1)), 8, 16)
    first = [1, 0.316227766, 0.1, 0.0316227766, 0.01, 0.0031622777, 0.001, 0.00031622777]
    last = [2, 0.416227766, 0.11, 0.0326227766, 1.01, 0.0131622777, 1.001, 0.0103162278]
    assert angles[0].tolist() == pytest.approx(first, abs=1e-6)
    assert angles[-1].tolist() == pytest.approx(last, abs=1e-6)


@st.composite
def grids(draw):
    """Grids of at most 2,048 tokens whose sides go up to 1,024."""
    sides = draw(st.permutations([draw(st.integers(1, 1024)), draw(st.integers(1, 2)), 1]))
    return tuple(sides)


source_ids = st.one_of(st.integers(0, 64).map(float), st.floats(0, 64, width=32))


@settings(max_examples=40)
@given(segments=st.lists(st.tuples(grids(), source_ids), min_size=1, max_size=3), dim=st.sampled_from([16, 128]))
def test_rotation_is_that_of_complex_exponentials(segments, dim):
    rows = table(*((*grid, source_id) for grid, source_id in segments))
    count = tokens_of(rows)
    expected = np.concatenate([phases(grid, source_id, dim) for grid, source_id in segments])
    angles = sa3d_angles(rows, count, dim)
    assert np.abs(np.exp(1j * angles.numpy()) - expected).max() < 1e-9
    prepared = prepare_segments(rows.float(), count, dim)
    for found, part in zip(prepared.constants, (expected.real, expected.imag), strict=True):
        assert np.abs(found.double().numpy() - part).max() < 1e-6 and found.dtype == torch.float32


@settings(max_examples=40)
@given(
    position=st.tuples(st.integers(0, 1023), st.integers(0, 4), st.integers(0, 4)).flatmap(st.permutations).map(tuple),
    source_id=source_ids,
)
def test_angles_are_exact(position, source_id):
    expected = []
    for axis, size in enumerate((44, 42, 42)):
        expected += [position[axis] * 10000.0 ** (-2 * k / size) for k in range(size // 2)]
    expected = [a + source_id * 10000.0 ** (-2 * k / 128) for k, a in enumerate(expected)]
    assert angles_at(position, source_id).tolist() == pytest.approx(expected, abs=1e-6)


def test_every_segment_starts_at_the_origin():
    rows = table((2, 3, 2, 1.0), (1, 2, 2, 2.0), (2, 3, 2, 1.0))
    angles = sa3d_angles(rows, tokens_of(rows), HEAD)
    assert torch.equal(angles[:12], angles[16:])
    assert torch.equal(angles[12:16], sa3d_angles(table((1, 2, 2, 2.0)), 4, HEAD))


def _op_inputs(randn, dtype=torch.float32):
    rows = table((2, 3, 4, 1 + 4 / 7), (3, 2, 2, 0.0)).float()
    count, draw = tokens_of(rows), randn(1)
    q, k = draw(count, 2, HEAD).to(dtype), draw(count, 2, HEAD).to(dtype)
    return rows, q, k, 1 + 0.2 * draw(2 * HEAD), 1 + 0.2 * draw(2 * HEAD)


def _complex_norm_rope(x, weight, rows, eps=1e-6):
    """RMSNorm over all heads and a complex product, in float64."""
    x = x.double().flatten(1)
    x = (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()).view(-1, 2, HEAD // 2, 2)
    grids = [((int(t), int(h), int(w)), s) for _, t, h, w, s in rows.double().tolist()]
    phase = torch.from_numpy(np.concatenate([phases(grid, s, HEAD) for grid, s in grids]))
    return torch.view_as_real(torch.view_as_complex(x.contiguous()) * phase[:, None]).flatten(-2)


def test_op_normalises_the_full_width_and_rotates(randn):
    rows, q, k, weight_q, weight_k = _op_inputs(randn)
    out = sa3d_qk_norm_rope(q, k, weight_q, weight_k, prepare_segments(rows, len(q), HEAD), 1e-6)
    for found, x, weight in zip(out, (q, k), (weight_q, weight_k), strict=True):
        assert found.dtype == torch.float32
        assert (found - _complex_norm_rope(x, weight, rows)).abs().max() < 2e-6


def test_op_gradients_are_those_of_the_complex_product(randn, relative_error):
    rows, *inputs = _op_inputs(randn)
    probes = [randn(2)(inputs[0].shape), randn(3)(inputs[0].shape)]
    leaves = [x.requires_grad_() for x in inputs]
    q, k = sa3d_qk_norm_rope(*leaves, prepare_segments(rows, len(inputs[0]), HEAD), 1e-6)
    found = torch.autograd.grad((q * probes[0]).sum() + (k * probes[1]).sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    loss = sum((_complex_norm_rope(exact[i], exact[i + 2], rows) * probes[i]).sum() for i in (0, 1))
    for a, b in zip(found, torch.autograd.grad(loss, exact), strict=True):
        assert relative_error(a.double(), b) < 1e-6


def test_op_rounds_the_norm_before_it_rotates(randn):
    rows, q, k, weight_q, weight_k = _op_inputs(randn, torch.bfloat16)
    segments = prepare_segments(rows, len(q), HEAD)
    cos, sin = segments.constants
    still = replace(segments, constants=(torch.ones_like(cos), torch.zeros_like(sin)))
    normed, _ = sa3d_qk_norm_rope(q, k, weight_q, weight_k, still, 1e-6)
    found, _ = sa3d_qk_norm_rope(q, k, weight_q, weight_k, segments, 1e-6)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rotate(normed, cos, sin).bfloat16())


@settings(max_examples=25)
@given(
    a=st.tuples(*[st.integers(0, 6)] * 3, st.floats(0, 5)),
    b=st.tuples(*[st.integers(0, 6)] * 3, st.floats(0, 5)),
    shift=st.tuples(*[st.integers(0, 6)] * 3, st.floats(0, 5)),
)
def test_scores_depend_on_differences_alone(a, b, shift):
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, HEAD, dtype=torch.float64, generator=draw)

    def score(one, other):
        turned = []
        for x, (*position, source_id) in ((q, one), (k, other)):
            angles = angles_at(tuple(position), source_id)[None]
            turned.append(rotate(x, angles.cos(), angles.sin()))
        return (turned[0] * turned[1]).sum().item()

    moved = [tuple(x + d for x, d in zip(one, shift, strict=True)) for one in (a, b)]
    assert score(a, b) == pytest.approx(score(*moved), abs=1e-9)

"""How many tokens each planning step reveals, and which."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bernini.errors import ConfigError
from bernini.planner.reveal import reveal_counts, reveal_order, uncertainty

VIDEO = (5, 6, 10)  # 81 frames of 480x848


@pytest.mark.parametrize(
    ("tokens", "counts"),
    [
        (300, "1 2 3 4 5 7 7 9 9 11 11 13 13 14 15 16 16 17 17 18 18 18 19 19 18"),
        (64, "1 1 1 1 1 1 1 1 2 3 2 3 3 3 3 3 4 3 4 4 4 4 3 4 4"),
    ],
)
def test_released_counts_of_25_steps(tokens, counts):
    assert reveal_counts(tokens, 25) == [int(count) for count in counts.split()]


@given(st.integers(1, 400), st.integers(1, 60))
def test_counts_add_up(tokens, steps):
    counts = reveal_counts(tokens, steps)
    assert len(counts) == steps and sum(counts) == tokens and min(counts) >= 0
    assert counts[-1] >= 1, "the last step always reveals"
    if steps > tokens:
        assert counts == [1] * (tokens - 1) + [0] * (steps - tokens) + [1]
    else:
        assert min(counts) >= 1


@pytest.mark.parametrize(("tokens", "steps"), [(0, 5), (5, 0)])
def test_nothing_to_reveal(tokens, steps):
    with pytest.raises(ConfigError, match="planning steps"):
        reveal_counts(tokens, steps)


def test_random_order_golden(goldens):
    golden = json.loads((goldens / "mar_order.json").read_text())
    for name, order in golden.items():
        tokens, seed = (int(part.lstrip("Nsed")) for part in name.split("_")[1:])
        assert reveal_order(tokens, seed).tolist() == order, name
    assert len(golden) == 4


@given(st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12)), st.integers(0, 1000))
def test_halton_visits_every_token_once(grid, seed):
    tokens = grid[0] * grid[1] * grid[2]
    order = reveal_order(tokens, seed, "halton", grid)
    assert sorted(order.tolist()) == list(range(tokens))
    assert torch.equal(order, reveal_order(tokens, seed, "halton", grid))


def test_seed_rotates_halton():
    first = {reveal_order(300, seed, "halton", VIDEO)[-1].item() for seed in range(20)}
    assert len(first) > 10


def crowding(order: torch.Tensor, revealed: int) -> float:
    """Variance of the number of revealed tokens over the quadrants of every frame."""
    t, h, w = VIDEO
    shown = torch.zeros(300).index_fill(0, order[-revealed:], 1)
    return shown.view(t, 2, h // 2, 2, w // 2).sum((2, 4)).var().item()


@pytest.mark.parametrize("revealed", [20, 60, 150])
def test_halton_spreads_what_is_revealed(revealed):
    halton, random = (
        sum(crowding(reveal_order(300, seed, how, VIDEO), revealed) for seed in range(10))
        for how in ("halton", "random")
    )
    assert halton < 0.7 * random


@pytest.mark.parametrize("grid", [None, (5, 6, 9)])
def test_halton_needs_the_grid_of_the_target(grid):
    with pytest.raises(ConfigError, match="halton"):
        reveal_order(300, 0, "halton", grid)


class GaussianHead:
    """The exact velocity of tokens that are Gaussian with mean ``c[..., :C]`` and standard deviation ``c[..., C]``."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        mean, variance, sigma = c[..., :-1], c[..., -1:] ** 2, t[..., None] / 1000
        spread = (1 - sigma) ** 2 * variance + sigma**2
        gap = x - (1 - sigma) * mean
        return sigma / spread * gap - (mean + (1 - sigma) * variance / spread * gap)  # E[noise | x] - E[x0 | x]


def test_uncertainty_of_gaussian_tokens(randn):
    draw = randn(0)
    deviation, noise = torch.tensor([[0.1, 2.0, 0.5], [1.0, 0.0, 4.0]]), draw(32)
    condition = torch.cat([draw(2, 3, 32), deviation[..., None]], -1)
    found = uncertainty(GaussianHead(), condition, noise)  # type: ignore[arg-type]
    variance = deviation**2
    torch.testing.assert_close(found, (variance / (1 + variance)) ** 2 * noise.square().mean())

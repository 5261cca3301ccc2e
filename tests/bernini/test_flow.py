"""Sigma tables, timestep densities, expert windows and the velocity loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bernini.errors import ConfigError
from bernini.flow.noise import NoiseConfig, add_noise, shift_sigma, sigma_table, velocity_losses
from bernini.flow.solvers import SOLVERS
from bernini.tasks import TASKS, get_task


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shift", [1.0, 3.0, 4.0, 5.0])
def test_sigma_table_follows_the_formula(shift):
    table = sigma_table(shift)
    expected = [shift * s / (1 + (shift - 1) * s) for s in ((1000 - i) / 1000 for i in range(1000))]
    assert table.dtype == torch.float32 and table.shape == (1000,)
    assert table[0] == 1 and (table.diff() < 0).all()
    assert table.tolist() == pytest.approx(expected, abs=1e-6)


def test_released_table_is_the_coarse_one():
    table = sigma_table(5.0, "released_bf16")
    assert len(table.unique()) == 270
    assert (1000 * table[:3]).bfloat16().tolist() == [1000, 1000, 992]
    assert (table.diff() > 0).any(), "rounding makes it go up in places"
    assert (table - sigma_table(5.0)).abs().max() < 0.01
    assert torch.equal(table.bfloat16().float(), table)


@pytest.mark.parametrize(("shift", "position"), [(3.0, 0.300), (4.0, 0.364), (5.0, 0.417)])
def test_the_boundary_is_crossed_where_the_released_configs_say(shift, position):
    assert (sigma_table(shift) - 0.875).abs().argmin().item() == round(1000 * position)
    assert shift_sigma(torch.tensor(1 - position), shift).item() == pytest.approx(0.875, abs=2e-4)


def test_densities_have_the_closed_form_of_the_paper():
    config, count, share = NoiseConfig(), 200_000, 0.417
    u = config.draw_position("logit_normal", count, generator())
    normal = 0.5 * (1 + math.erf((math.log(share / (1 - share)) - 0.5) / math.sqrt(2)))
    assert (u <= share).double().mean().item() == pytest.approx(normal, abs=0.004)
    assert normal == pytest.approx(0.20, abs=0.005)
    u = config.draw_position("mode", count, generator())
    assert (u <= share).double().mean().item() == pytest.approx(0.29, abs=0.008)
    u = config.draw_position("uniform", count, generator())
    assert (u <= share).double().mean().item() == pytest.approx(share, abs=0.004)


@pytest.mark.parametrize("density", ["logit_normal", "mode", "uniform"])
def test_positions_lie_in_the_table(density):
    u = NoiseConfig().draw_position(density, 100_000, generator())
    assert u.shape == (1, 100_000) and u.min() >= 0 and u.max() <= 1


def test_mode_density_maps_uniform_draws_by_the_paper_formula():
    found = NoiseConfig(mode_scale=0.7).draw_position("mode", 5, generator(3))
    raw = torch.rand(5, generator=generator(3), dtype=torch.float64).tolist()
    expected = [1 - r - 0.7 * (math.cos(math.pi * r / 2) ** 2 - 1 + r) for r in raw]
    assert found[0].tolist() == pytest.approx(expected)


@settings(max_examples=60)
@given(
    task=st.sampled_from(sorted(TASKS)),
    expert=st.sampled_from(["high", "low", "single"]),
    table=st.sampled_from(["exact", "released_bf16"]),
    boundary=st.floats(0.1, 0.9),
    seed=st.integers(0, 2**31),
)
def test_draws_lie_in_the_experts_window_and_repeat(task, expert, table, boundary, seed):
    config = NoiseConfig(boundary=boundary, table=table)
    sigma = config.draw_sigmas([get_task(task)], expert, [generator(seed)])[0]
    low, high = {"high": (boundary, 1), "low": (0, math.nextafter(boundary, 0)), "single": (0, 1)}[expert]
    assert low <= sigma <= high
    assert sigma in sigma_table(get_task(task).shift, table).tolist()
    assert sigma == config.draw_sigmas([get_task(task)], expert, [generator(seed)])[0]


def test_draws_use_the_tasks_density_unless_one_is_set():
    draw = generator(0)

    def share(config, task, count=3000):
        return sum(config.draw_sigmas([get_task(task)], "single", [draw])[0] >= 0.875 for _ in range(count)) / count

    assert share(NoiseConfig(), "v2v") == pytest.approx(0.29, abs=0.03)  # mode, shift 5
    assert share(NoiseConfig(), "t2v") == pytest.approx(0.17, abs=0.03)  # mode, shift 3
    assert share(NoiseConfig(), "t2i") == pytest.approx(0.09, abs=0.02)  # logit-normal, shift 3
    assert share(NoiseConfig(shift=5.0, density="logit_normal"), "t2v") == pytest.approx(0.20, abs=0.03)


def test_window_puts_the_boundary_with_the_high_expert():
    config, sigma = NoiseConfig(), torch.tensor([1.0, 0.875, 0.8749, 0.0])
    assert config.in_window(sigma, "high").tolist() == [True, True, False, False]
    assert config.in_window(sigma, "low").tolist() == [False, False, True, True]
    assert config.in_window(sigma, "single").all()


@pytest.mark.parametrize("values", [{"boundary": 0.0}, {"boundary": 1.0}, {"shift": 0.0}, {"shift": -3.0}])
def test_impossible_noise_is_refused(values):
    (key,) = values
    with pytest.raises(ConfigError, match=f"noise.{key}"):
        NoiseConfig(**values)


def test_noise_goes_straight_from_data_to_noise(randn):
    x0, noise = randn(0)(4, 2, 2, 2), randn(1)(4, 2, 2, 2)
    assert torch.equal(add_noise(x0, noise, 0.0), x0)
    assert torch.equal(add_noise(x0, noise, 1.0), noise)
    velocity = noise - x0
    torch.testing.assert_close(add_noise(x0, noise, 0.75) - add_noise(x0, noise, 0.25), 0.5 * velocity)


def test_losses_weigh_targets_alike_whatever_their_size():
    predicted = torch.zeros(7, 4)
    velocity = torch.cat([torch.full((1, 4), 3.0), torch.tensor([[1.0, 1.0, 3.0, 3.0]]).repeat(6, 1)])
    losses = velocity_losses(predicted, velocity, (1, 6))
    assert losses.tolist() == [9, 5]
    assert losses.mean() == 7
    assert velocity_losses(predicted.bfloat16(), velocity, (1, 6)).dtype == torch.float32


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (8, 5.0), (40, 3.0)])
def test_grids_are_the_released_ones(solver, steps, shift):
    grid = SOLVERS[solver](steps, shift)
    raw = [0.999 * (1 - i / steps) for i in range(steps)]
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in raw]
    assert grid.sigmas == pytest.approx([*sigmas, 0], abs=1e-6)
    assert grid.timesteps == [int(1000 * s) for s in sigmas]


def test_steps_of_the_high_expert_at_forty_steps():
    counts = {shift: sum(t >= 875 for t in SOLVERS["unipc"](40, shift).timesteps) for shift in (5.0, 3.0)}
    assert counts == {5.0: 17, 3.0: 12}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_constant_velocity_field_is_integrated_exactly(solver, randn):
    x, velocity = randn(0)(4, 2, 2, 2), randn(1)(4, 2, 2, 2)
    one, start = SOLVERS[solver](6, 5.0), x
    for index in range(6):
        x = one.step(index, velocity, x)
    torch.testing.assert_close(x, start - one.sigmas[0] * velocity, atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_can_begin_midway(solver, randn):
    x, velocity = randn(0)(4, 2, 2, 2), randn(1)(4, 2, 2, 2)
    one, start = SOLVERS[solver](6, 5.0, begin=4), x
    for index in (4, 5):
        x = one.step(index, velocity, x)
    torch.testing.assert_close(x, start - one.sigmas[4] * velocity, atol=1e-5, rtol=0)


def test_unipc_is_more_accurate_than_euler():
    """On ``dx / dsigma = -x``, whose solution is known."""

    def error(solver):
        one, x = SOLVERS[solver](10, 1.0), torch.ones(1, 1, 1, 1, dtype=torch.float64)
        for index in range(10):
            x = one.step(index, -x, x)
        return abs(x.item() - math.exp(one.sigmas[0]))

    assert error("unipc") < 0.05 * error("euler")


def test_a_window_that_the_density_never_reaches_is_an_error() -> None:
    noise = NoiseConfig(shift=1e-4)
    with pytest.raises(ConfigError, match="no timestep of task t2i"):
        noise.draw_sigmas([get_task("t2i")], "high", [torch.Generator().manual_seed(0)])

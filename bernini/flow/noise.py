"""Noise of flow matching: sigma tables, timestep densities and the velocity loss.

``x_sigma = (1 - sigma) x0 + sigma eps``, the model predicts the velocity ``eps - x0``, its timestep is ``1000 sigma``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from bernini.errors import ConfigError
from bernini.tasks import Density, Task

TRAIN_STEPS = 1000
MAX_REDRAWS = 1000
Expert = Literal["high", "low", "single"]
Table = Literal["exact", "released_bf16"]


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move sigmas towards noise: ``shift s / (1 + (shift - 1) s)``."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@lru_cache
def sigma_table(shift: float, table: Table = "exact") -> Tensor:
    """The 1000 training sigmas, descending from 1, in fp32 on the CPU.

    ``released_bf16`` is the table that the released trainer builds in bfloat16: for shift 5 it holds fewer than 300
    different values and repeats its first ones. It exists to reproduce that trainer.

    Args:
        shift: Flow-matching shift.
        table: Which table.
    """
    dtype = torch.bfloat16 if table == "released_bf16" else torch.float64
    return shift_sigma(torch.linspace(1, 0, TRAIN_STEPS + 1, dtype=dtype)[:-1], shift).float()


@dataclass
class NoiseConfig:
    """How training timesteps are drawn.

    Attributes:
        shift: One shift for all tasks; each task's own if null.
        density: One density for all tasks; each task's own if null.
        logit_mean: Mean of the logit-normal density.
        logit_std: Standard deviation of the logit-normal density.
        mode_scale: Scale of the "mode" density.
        boundary: Sigma at which the low-noise expert takes over.
        table: Sigma table.
    """

    shift: float | None = None
    density: Density | None = None
    logit_mean: float = 0.5
    logit_std: float = 1.0
    mode_scale: float = 1.29
    boundary: float = 0.875
    table: Table = "exact"

    def __post_init__(self) -> None:
        if not 0 < self.boundary < 1:
            raise ConfigError(f"noise.boundary is {self.boundary}", why="sigmas lie between 0 and 1", fix="0.875")
        if self.shift is not None and self.shift <= 0:
            raise ConfigError(f"noise.shift is {self.shift}", why="a shift is a positive factor")

    def draw_position(self, density: Density, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``[count]`` positions u in [0, 1] along the sigma table; 0 is pure noise (paper eqs 6-7)."""
        if density == "logit_normal":
            z = torch.randn(count, generator=generator, dtype=torch.float64)
            return torch.sigmoid(self.logit_mean + self.logit_std * z)
        r = torch.rand(count, generator=generator, dtype=torch.float64)
        if density == "uniform":
            return r
        return 1 - r - self.mode_scale * (torch.cos(torch.pi * r / 2) ** 2 - 1 + r)

    def in_window(self, sigma: Tensor, expert: Expert) -> Tensor:
        """Which sigmas the expert is responsible for; the same side of the boundary as at inference."""
        if expert == "single":
            return torch.ones_like(sigma, dtype=torch.bool)
        return sigma >= self.boundary if expert == "high" else sigma < self.boundary

    def draw_sigma(self, task: Task, expert: Expert, generator: torch.Generator) -> float:
        """Draw the sigma of one sample, by rejection inside the expert's window.

        Args:
            task: Gives shift and density unless they are set here.
            expert: Whose window.
            generator: CPU generator.

        Raises:
            ConfigError: The density all but never falls into the window.
        """
        sigmas = sigma_table(self.shift or task.shift, self.table)
        density = self.density or task.density
        for _ in range(
            MAX_REDRAWS
        ):  # the tasks' rarest window (logit-normal, shift 3, high) accepts one draw in eleven
            u = self.draw_position(density, 64, generator)
            drawn = sigmas[(u * TRAIN_STEPS).long().clamp(0, TRAIN_STEPS - 1)]
            accepted = drawn[self.in_window(drawn, expert)]
            if len(accepted):
                return accepted[0].item()
        raise ConfigError(
            f"no timestep of task {task.name} falls to the {expert}-noise expert",
            where="model.init_args.noise",
            why=f"shift {self.shift or task.shift} and the {density} density hardly reach its side of {self.boundary}",
            fix="choose a larger shift for the high-noise expert, a smaller one for the low-noise expert",
        )


def add_noise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """``(1 - sigma) x0 + sigma eps``."""
    return (1 - sigma) * x0 + sigma * noise


def velocity_losses(predicted: Tensor, velocity: Tensor, lengths: Sequence[int]) -> Tensor:
    """Squared error of each target: mean over its channels and tokens.

    Args:
        predicted: ``[tokens, channels]``.
        velocity: ``[tokens, channels]``, noise minus data.
        lengths: Tokens of each target.

    Returns:
        ``[targets]`` fp32. Averaging them weighs targets alike, whatever their size, as the released trainer does.
    """
    error = (predicted.float() - velocity.float()).square().mean(-1)
    return torch.stack([part.mean() for part in error.split(list(lengths))])

"""Noise of flow matching: sigma tables, timestep densities and the velocity loss.

``x_sigma = (1 - sigma) x0 + sigma eps``, the model predicts the velocity ``eps - x0``, its timestep is ``1000 sigma``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Literal, NoReturn

import torch
from torch import Tensor

from bernini.errors import ConfigError
from bernini.stacking import group
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
    """How training timesteps are drawn; validation keeps to `tasks_own`.

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

    def tasks_own(self) -> "NoiseConfig":
        """The noise of validation, under which losses of runs compare: as by default, but for boundary and table."""
        return NoiseConfig(boundary=self.boundary, table=self.table)

    def draw_position(self, density: Density, count: int, *generators: torch.Generator) -> Tensor:
        """Draw ``[generators, count]`` positions u in [0, 1] along the sigma table; 0 is pure noise (paper eqs 6-7)."""
        draw = torch.randn if density == "logit_normal" else torch.rand
        drawn = torch.stack([draw(count, generator=generator, dtype=torch.float64) for generator in generators])
        if density == "logit_normal":
            return torch.sigmoid(self.logit_mean + self.logit_std * drawn)
        if density == "uniform":
            return drawn
        return 1 - drawn - self.mode_scale * (torch.cos(torch.pi * drawn / 2) ** 2 - 1 + drawn)

    def in_window(self, sigma: Tensor, expert: Expert) -> Tensor:
        """Which sigmas the expert is responsible for; the same side of the boundary as at inference."""
        if expert == "single":
            return torch.ones_like(sigma, dtype=torch.bool)
        return sigma >= self.boundary if expert == "high" else sigma < self.boundary

    def draw_sigmas(self, tasks: Sequence[Task], expert: Expert, generators: Sequence[torch.Generator]) -> list[float]:
        """Draw the sigma of each sample, by rejection inside the expert's window.

        Args:
            tasks: Task of each sample; gives shift and density unless they are set here.
            expert: Whose window.
            generators: CPU generator of each sample, on which alone its sigma depends.

        Raises:
            ConfigError: The density all but never falls into the window.
        """
        found: dict[int, float] = {}
        for _ in range(MAX_REDRAWS):
            left = [n for n in range(len(tasks)) if n not in found]
            if not left:
                break
            for rows in group((self.shift or tasks[n].shift, self.density or tasks[n].density) for n in left):
                members = [left[row] for row in rows]
                first = tasks[members[0]]
                # The tasks' rarest window (logit-normal, shift 3, high) accepts one draw in eleven.
                u = self.draw_position(self.density or first.density, 64, *(generators[n] for n in members))
                sigmas = sigma_table(self.shift or first.shift, self.table)
                drawn = sigmas[(u * TRAIN_STEPS).long().clamp(0, TRAIN_STEPS - 1)]
                inside = self.in_window(drawn, expert)
                values = drawn.gather(1, inside.int().argmax(1, keepdim=True)).squeeze(1)  # each one's first inside
                accepted = zip(members, values.tolist(), inside.any(1).tolist(), strict=True)
                found.update((n, value) for n, value, ok in accepted if ok)
        else:
            self._refuse(tasks[left[0]], expert)
        return [found[n] for n in range(len(tasks))]

    def _refuse(self, task: Task, expert: Expert) -> NoReturn:
        raise ConfigError(
            f"no timestep of task {task.name} falls to the {expert}-noise expert",
            where="model.init_args.noise",
            why=f"shift {self.shift or task.shift} and the {self.density or task.density} density hardly reach its "
            f"side of {self.boundary}",
            fix="choose a larger shift for the high-noise expert, a smaller one for the low-noise expert",
        )


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """``(1 - sigma) x0 + sigma eps``; a tensor of sigmas has to broadcast."""
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
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]  # neighbours of equal lengths share a call
    parts = error.split([length * count for length, count in runs])
    return torch.cat([part.view(count, length).mean(1) for part, (length, count) in zip(parts, runs, strict=True)])

"""Solvers of the sampling ODE on the released sigma grid."""

from typing import Literal, Protocol

import numpy as np
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

SolverName = Literal["unipc", "euler"]


class Solver(Protocol):
    """Trajectories of one shape, side by side.

    Attributes:
        sigmas: ``[steps + 1]`` descending, the last one 0.
        timesteps: ``[steps]`` integers in 0..999 that the model is given.
    """

    sigmas: list[float]
    timesteps: list[int]

    def step(self, index: int, velocity: Tensor, x: Tensor) -> Tensor:
        """Go from ``sigmas[index]`` to the next one.

        Args:
            index: The step.
            velocity: ``[B, C, T, H, W]``.
            x: ``[B, C, T, H, W]`` latents at ``sigmas[index]``.
        """
        ...


class UniPC:
    """UniPC of order 2 (bh2), diffusers' implementation.

    The grid is ``linspace(0.999, 0, steps + 1)[:-1]`` under the shift: the one that the released checkpoints are
    sampled on, while diffusers' present default starts at 1 and ends elsewhere.

    Args:
        steps: Number of steps.
        shift: Flow-matching shift.
        begin: First step that will be made.
    """

    def __init__(self, steps: int, shift: float, begin: int = 0) -> None:
        self._scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2, solver_type="bh2"
        )
        self._scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])
        self._scheduler.set_begin_index(begin)
        self.sigmas = self._scheduler.sigmas.tolist()
        self.timesteps = self._scheduler.timesteps.tolist()

    def step(self, index: int, velocity: Tensor, x: Tensor) -> Tensor:
        """Go from ``sigmas[index]`` to the next one; steps must be made in order."""
        return self._scheduler.step(velocity, self.timesteps[index], x, return_dict=False)[0]


class Euler:
    """Euler on the same grid.

    Args:
        steps: Number of steps.
        shift: Flow-matching shift.
        begin: First step that will be made.
    """

    def __init__(self, steps: int, shift: float, begin: int = 0) -> None:
        grid = UniPC(steps, shift, begin)
        self.sigmas, self.timesteps = grid.sigmas, grid.timesteps

    def step(self, index: int, velocity: Tensor, x: Tensor) -> Tensor:
        """Go from ``sigmas[index]`` to the next one."""
        return x + (self.sigmas[index + 1] - self.sigmas[index]) * velocity


SOLVERS: dict[SolverName, type[UniPC] | type[Euler]] = {"unipc": UniPC, "euler": Euler}

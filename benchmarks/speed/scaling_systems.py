"""What is trained on several GPUs: the renderer and the planner, of random weights and on random samples."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.planner_train import NTP, Trainee, TrainProblem, ntp_loss
from bernini.flow.noise import velocity_losses
from bernini.renderer.experts import Architecture
from bernini.renderer.packing import PackedSample, Segment, pack, target_patches

PATCH = (1, 2, 2)


class System(ABC):
    """A model, and batches that are the same on every rank that asks for the same ones.

    Attributes:
        device: Where it computes.
    """

    device: torch.device

    @property
    @abstractmethod
    def heads(self) -> int:
        """Heads that Ulysses divides."""

    @abstractmethod
    def build(self) -> tuple[nn.Module, Iterable[nn.Module]]:
        """A model with the same fp32 weights every time, and the blocks that are gathered one at a time."""

    @abstractmethod
    def batch(self, step: int, numbers: Sequence[int], timed: bool) -> tuple[int, Any]:
        """Samples of a step, small ones unless they are timed: how many tokens they have, and what `loss` takes."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean loss of a batch, from one forward."""


@dataclass
class RendererSystem(System):
    """One transformer that learns clips.

    Attributes:
        architecture: Its shape.
        rows: Rows of text of each clip.
        small: Patches of the clips whose losses are compared.
        large: Patches of those that are timed.
        device: Where it computes.
    """

    architecture: Architecture
    rows: int
    small: tuple[int, int, int]
    large: tuple[int, int, int]
    device: torch.device

    @property
    def heads(self) -> int:
        """Heads of self-attention."""
        return self.architecture.num_attention_heads

    def build(self) -> tuple[nn.Module, Iterable[nn.Module]]:
        """Every block is recomputed in the backward pass."""
        torch.manual_seed(0)
        with self.device:
            model = self.architecture.build()
        model.gradient_checkpointing = True
        return model, model.blocks

    def batch(self, step: int, numbers: Sequence[int], timed: bool) -> tuple[int, Any]:
        """Clips that stay the same, under noise of each step, and the velocity that is asked for."""
        t, h, w = self.large if timed else self.small
        samples, velocities = [], []
        for number in numbers:
            clip, noised = (torch.Generator(self.device).manual_seed(seed) for seed in (number, 1000 * step + number))
            shape = (self.architecture.in_channels, t, PATCH[1] * h, PATCH[2] * w)
            latent = torch.randn(shape, generator=clip, device=self.device)
            context = torch.randn((self.rows, self.architecture.text_dim), generator=clip, device=self.device)
            noise = torch.randn(shape, generator=noised, device=self.device)
            sigma = torch.rand((), generator=noised, device=self.device).item()
            samples.append(PackedSample([Segment(torch.lerp(latent, noise, sigma), 0)], context, 1000 * sigma))
            velocities.append(target_patches(noise - latent, PATCH))
        packed = pack(samples, PATCH)
        return packed.tokens, (packed, torch.cat(velocities))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Of all clips alike."""
        packed, velocity = batch
        return velocity_losses(model(packed)[packed.target_index], velocity, packed.target_lengths).mean()


@dataclass
class PlannerSystem(System):
    """A planner, all of it but the vision tower, that learns one pack under noise of each step.

    Attributes:
        problem: Its shape and the pack.
        device: Where it computes.
    """

    problem: TrainProblem
    device: torch.device

    @property
    def heads(self) -> int:
        """Heads of keys and values."""
        return self.problem.shape.text["num_key_value_heads"]

    def build(self) -> tuple[nn.Module, Iterable[nn.Module]]:
        """Text layers are recomputed in the backward pass, and of the flow head as much as sharded training does."""
        self._trainee: Trainee | None = None  # before there is another
        self._trainee = Trainee(self.problem, ["text", "flow"], optimizer=False)
        return self._trainee.model, self._trainee.model.blocks

    def batch(self, step: int, numbers: Sequence[int], timed: bool) -> tuple[int, Any]:
        """The pack, whatever the numbers."""
        return self.problem.tokens, step

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Of plan and answers."""
        torch.manual_seed(batch)
        trainee = self._trainee
        assert trainee is not None
        draws = trainee.model.vit_decoder.draw(len(trainee.truth), device=self.device)
        output = model(trainee.pack, trainee.features, trainee.masked, draws)
        return output.visual.mean() + NTP * ntp_loss(output)

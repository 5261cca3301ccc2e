"""The flow head: draws the ViT embedding of a token from a distribution that the planner's state conditions.

It is a flow model of single vectors, ``x_sigma = (1 - sigma) x0 + sigma eps`` as in `bernini.flow`, without attention:
what couples tokens is the multimodal LLM, which sees the ones that are drawn already. Names, shapes and arithmetic are
those of the released ``vit_decoder``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bernini.errors import ConfigError, DataError
from bernini.flow.noise import TRAIN_STEPS, add_noise, shift_sigma
from bernini.planner.adaln import FREQUENCIES, AdaLNMLP
from bernini.planner.at_once import sum_at_once

SIGMA_MIN = 0.003 / 1.002
CHUNK = 8192  # rows that keep matrix products of the released head busy, with 11 GB of activations in bf16
SAMPLED = 128  # tokens whose modulations of all steps are held at once
Stream = Literal["cond", "uncond", "imgcond"]


@dataclass
class FlowHeadConfig:
    """Shape and training of a flow head; the defaults are the released ones.

    Attributes:
        target_dim: Channels C of a ViT embedding.
        condition_dim: Channels Z of the connector's output.
        width: Width of the MLP.
        depth: Residual blocks.
        shift: Flow-matching shift of its sigmas.
        batch_mul: Noises that training draws for each token.
        weighting: Weight of a training timestep. ``gaussian`` is ``exp(-2 ((t - 500) / 1000)^2)`` less its minimum,
            scaled to mean 1 over the table. The released trainer asks its scheduler for a weight that the released
            scheduler lacks; this is the one of the flow-matching scheduler it descends from, hence inferred.
        gradient_checkpointing: Recompute blocks in the backward pass.
        chunk: Rows, of draws times tokens, that training evaluates at a time, to the nearest whole draw; all at once if
            null. Gradients of a chunk are made before the next one begins (`bernini.planner.at_once`): memory is that
            of one chunk, and nothing is recomputed. Sharded weights do not allow it, and are used on all rows at once.
    """

    target_dim: int = 3584
    condition_dim: int = 3584
    width: int = 4096
    depth: int = 16
    shift: float = 2.0
    batch_mul: int = 16
    weighting: Literal["gaussian", "uniform"] = "gaussian"
    gradient_checkpointing: bool = False
    chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("target_dim", "condition_dim", "width", "depth", "shift", "batch_mul", "chunk"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ConfigError(f"{name} of the flow head is {getattr(self, name)}", why="it has to be positive")


@dataclass(frozen=True)
class Draws:
    """Timesteps and noises of training.

    Attributes:
        index: ``[draws, n]`` rows of the table of timesteps.
        noise: ``[draws, n, C]``.
    """

    index: Tensor
    noise: Tensor

    @classmethod
    def cat(cls, parts: Sequence["Draws"]) -> "Draws":
        """Lay the tokens of several draws side by side."""
        return cls(torch.cat([part.index for part in parts], 1), torch.cat([part.noise for part in parts], 1))

    def split(self, draws: int) -> list["Draws"]:
        """So many draws of all tokens at a time."""
        return [Draws(*part) for part in zip(self.index.split(draws), self.noise.split(draws), strict=True)]


def guidance_weights(txt: float, img: float) -> dict[Stream, float]:
    """Weight of each stream's velocity under the planner's guidance; streams that cancel out are left out.

    ``uncond + img (imgcond - uncond) + txt (cond - imgcond)``, sorted by stream. The released weights (txt 1.2, img 1)
    never need ``uncond``, equal ones never need ``imgcond``, and 1 and 1 need ``cond`` alone.

    Args:
        txt: Weight of the step from ``imgcond`` to ``cond``.
        img: Weight of the step from ``uncond`` to ``imgcond``.
    """
    weights: dict[Stream, float] = {"cond": txt, "uncond": 1 - img, "imgcond": img - txt}
    return {stream: weight for stream, weight in weights.items() if weight}


class FlowHead(nn.Module):
    """Velocity of single noised ViT embeddings, its loss and its sampler.

    Every parameter belongs to ``net`` and is used inside ``net``'s forward: that is what to shard or to compile.

    Args:
        config: Shape and training.
    """

    def __init__(self, config: FlowHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.net = AdaLNMLP(config.target_dim, config.condition_dim, config.width, config.depth)
        self.net.gradient_checkpointing = config.gradient_checkpointing

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Predict the velocity ``eps - x0``.

        Leading dimensions broadcast, ``[draws, n, C]`` and a scalar timestep included, so that what depends on ``c`` or
        on ``t`` alone is computed once.

        Args:
            x: ``[n, C]`` noised embeddings.
            t: ``[n]`` timesteps in 0..1000.
            c: ``[n, Z]`` conditions.

        Returns:
            ``[n, C]`` in the dtype of the weights, or of autocast.
        """
        return self.net(x, _waves(t), c)

    def sigmas(self, steps: int, device: torch.device | str | None = None) -> Tensor:
        """Noise levels ``[steps]`` in fp32, descending from 1: where sampling steps start, or the training table.

        Args:
            steps: Number of steps; the last one goes to sigma 0.
            device: Where to make them.

        Raises:
            ConfigError: There is no step to make.
        """
        if steps < 1:
            raise ConfigError(f"{steps} flow steps", why="the flow head needs at least one", fix="the released 5, or 1")
        uniform = torch.linspace(1, SIGMA_MIN, steps + 1, dtype=torch.float64, device=device)[:-1]
        return shift_sigma(uniform, self.config.shift).float()

    def draw(
        self, count: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Draws:
        """Draw what training compares: timesteps, uniform over the table of 1000, then noises.

        Args:
            count: Number of tokens.
            generator: Source, on that device.
            device: Where to draw.
        """
        shape = (self.config.batch_mul, count)
        index = torch.randint(TRAIN_STEPS, shape, generator=generator, device=device)
        return Draws(index, torch.randn(*shape, self.config.target_dim, generator=generator, device=device))

    def loss(self, c: Tensor, target: Tensor, draws: Draws) -> Tensor:
        """Flow-matching loss of each token: squared error of the velocity, mean over channels and over draws.

        In chunks, gradients are made in the forward pass, and the backward pass takes one weight for all tokens: that
        of a sum or of a mean.

        Args:
            c: ``[n, Z]`` conditions.
            target: ``[n, C]`` true embeddings.
            draws: Timesteps and noises, ``batch_mul`` of each token.

        Returns:
            ``[n]`` fp32.

        Raises:
            DataError: The embeddings have another width.
        """
        if target.shape[-1] != self.config.target_dim:
            raise DataError(
                f"the target's embeddings have {target.shape[-1]} channels",
                why=f"the flow head predicts {self.config.target_dim}",
                fix="embed targets with the planner's own vision tower, or set target_dim of the flow head",
            )
        table, x0 = self.sigmas(TRAIN_STEPS, target.device), target.float()
        weights = _gaussian_weights(table) if self.config.weighting == "gaussian" else torch.ones_like(table)

        def share(c: Tensor, part: Draws) -> Tensor:
            sigma = table[part.index]
            velocity = self(add_noise(x0, part.noise, sigma.unsqueeze(-1)), TRAIN_STEPS * sigma, c)
            error = (velocity.float() - (part.noise - x0)).square().mean(-1)
            return (error * weights[part.index]).mean(0) * (len(part.index) / len(draws.index))

        parts, chunk = [draws], self.config.chunk
        if chunk is not None and not any(isinstance(weight, DTensor) for weight in self.parameters()):
            parts = draws.split(max(1, round(chunk / max(1, len(target)))))
        return sum_at_once(share, parts, c, self.parameters())

    @torch.no_grad()
    def sample(
        self, c_streams: Mapping[Stream, Tensor], noise: Tensor, steps: int, txt: float = 1.0, img: float = 1.0
    ) -> Tensor:
        """Draw embeddings: Euler steps in fp32, guided between streams that start from the same noise.

        Args:
            c_streams: ``[n, Z]`` conditions of each stream; those that `guidance_weights` leaves out may be missing.
                Without guidance (txt 1, img 1), ``cond`` is enough.
            noise: ``[n, C]``.
            steps: Number of steps.
            txt: Weight of the step from ``imgcond`` to ``cond``.
            img: Weight of the step from ``uncond`` to ``imgcond``.

        Returns:
            ``[n, C]`` fp32.

        Raises:
            ConfigError: There is no step to make, or a stream that the guidance needs is missing.
        """
        weights = guidance_weights(txt, img)
        if missing := sorted(weights.keys() - c_streams.keys()):
            raise ConfigError(
                f"the flow head lacks the stream {', '.join(missing)}",
                why=f"guidance with txt {txt} and img {img} needs {', '.join(weights)}",
                fix="give all three streams, or txt 1 and img 1 for no guidance",
            )
        c = torch.stack([c_streams[stream] for stream in weights])
        rows = zip(noise.split(SAMPLED), c.split(SAMPLED, 1), strict=True)
        return torch.cat([self._walk(x, own, steps, list(weights.values())) for x, own in rows])

    def _walk(self, noise: Tensor, c: Tensor, steps: int, weights: Sequence[float]) -> Tensor:
        """Euler steps of some tokens from ``noise [n, C]``, guided between conditions ``c [streams, n, Z]``."""
        waves = _waves(TRAIN_STEPS * self.sigmas(steps, c.device))
        modulations = self.net.modulations(waves[:, None, None], c)  # of all steps at once: weights are read once
        x = noise.float()
        for step, (sigma, following) in enumerate(pairwise([*self.sigmas(steps).tolist(), 0.0])):
            velocities = self.net.modulated(x, [of_all[step] for of_all in modulations]).float()
            for weight, velocity in zip(weights, velocities, strict=True):
                x = x + (following - sigma) * weight * velocity
        return x


def _waves(t: Tensor) -> Tensor:
    """Sinusoidal features ``[..., 256]`` of timesteps, outside of the net, where mixed precision would round these."""
    waves = get_timestep_embedding(t.flatten(), FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
    return waves.reshape(*t.shape, FREQUENCIES)


def _gaussian_weights(sigmas: Tensor) -> Tensor:
    bell = torch.exp(-2 * (sigmas - 0.5) ** 2)
    bell = bell - bell.min()
    return bell / bell.mean()

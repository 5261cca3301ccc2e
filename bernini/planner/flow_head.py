"""The flow head: draws the ViT embedding of a token from a distribution that the planner's state conditions.

It is a flow model of single vectors, ``x_sigma = (1 - sigma) x0 + sigma eps`` as in `bernini.flow`, without attention:
what couples tokens is the multimodal LLM, which sees the ones that are drawn already. Names, shapes and arithmetic are
those of the released ``vit_decoder``, an MLP with adaptive layer norms after MAR's (arXiv 2406.11838).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bernini.errors import ConfigError, DataError
from bernini.flow.noise import TRAIN_STEPS, add_noise, shift_sigma

SIGMA_MIN = 0.003 / 1.002
FREQUENCIES = 256
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
    """

    target_dim: int = 3584
    condition_dim: int = 3584
    width: int = 4096
    depth: int = 16
    shift: float = 2.0
    batch_mul: int = 16
    weighting: Literal["gaussian", "uniform"] = "gaussian"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("target_dim", "condition_dim", "width", "depth", "shift", "batch_mul"):
            if getattr(self, name) <= 0:
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
        self.net = AdaLNMLP(config)

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
        # Outside of `net`, where mixed precision would round the timesteps before their sines are taken.
        waves = get_timestep_embedding(t.flatten(), FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.net(x, waves.reshape(*t.shape, FREQUENCIES), c)

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
        index, noise, table = draws.index, draws.noise, self.sigmas(TRAIN_STEPS, target.device)
        sigma, x0 = table[index], target.float()
        velocity = self(add_noise(x0, noise, sigma.unsqueeze(-1)), TRAIN_STEPS * sigma, c)
        error = (velocity.float() - (noise - x0)).square().mean(-1)
        if self.config.weighting == "gaussian":
            error = error * _gaussian_weights(table)[index]
        return error.mean(0)

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
        x = noise.float()
        for sigma, following in pairwise([*self.sigmas(steps).tolist(), 0.0]):
            velocities = self(x, x.new_full((1,), TRAIN_STEPS * sigma), c).float()
            for weight, velocity in zip(weights.values(), velocities, strict=True):
                x = x + (following - sigma) * weight * velocity
        return x


def _gaussian_weights(sigmas: Tensor) -> Tensor:
    bell = torch.exp(-2 * (sigmas - 0.5) ** 2)
    bell = bell - bell.min()
    return bell / bell.mean()


class AdaLNMLP(nn.Module):
    """The released ``SimpleMLPAdaLN``: residual blocks whose layer norms are modulated by time and condition.

    Args:
        config: Shape.
    """

    def __init__(self, config: FlowHeadConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = config.gradient_checkpointing
        width = config.width
        self.time_embed = nn.ModuleDict({"mlp": _mlp(FREQUENCIES, width)})
        self.cond_embed = nn.Linear(config.condition_dim, width)
        self.input_proj = nn.Linear(config.target_dim, width)
        self.res_blocks = nn.ModuleList(Block(width) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.target_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: Xavier, normal of 0.02 for time; at first blocks are identities and the velocity is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for module in self.time_embed.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        modulations = [layer.adaLN_modulation[1] for layer in (*self.res_blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, waves: Tensor, c: Tensor) -> Tensor:
        """Predict the velocity; leading dimensions broadcast.

        Args:
            x: ``[n, C]`` noised embeddings.
            waves: ``[n, 256]`` sinusoidal features of their timesteps.
            c: ``[n, Z]`` conditions.

        Returns:
            ``[n, C]``.
        """
        dtype = self.input_proj.weight.dtype
        x = self.input_proj(x.to(dtype))
        y = self.time_embed["mlp"](waves.to(dtype)) + self.cond_embed(c.to(dtype))
        y = nn.functional.silu(y)
        for block in self.res_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, y, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, y)
        return self.final_layer(x, y)


class Block(nn.Module):
    """A gated residual MLP behind a modulated layer norm.

    Args:
        width: Width of everything.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _mlp(width, width)
        self.adaLN_modulation = _modulation(width, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add to ``x [n, width]``; ``y [n, width]`` is the SiLU of the embedded time and condition."""
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """A modulated layer norm and the way back to embeddings.

    Args:
        width: Width of the MLP.
        target_dim: Channels of an embedding.
    """

    def __init__(self, width: int, target_dim: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, target_dim)
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Project ``x [n, width]``; ``y [n, width]`` is the SiLU of the embedded time and condition."""
        shift, scale = self.adaLN_modulation(y).chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def _modulation(width: int, parts: int) -> nn.Sequential:
    # The released layers have a SiLU in the first place, whose argument is the same for all of them.
    return nn.Sequential(nn.Identity(), nn.Linear(width, parts * width))

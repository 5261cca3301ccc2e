"""The net of the flow head: an MLP with adaptive layer norms after MAR's (arXiv 2406.11838)."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FREQUENCIES = 256


class AdaLNMLP(nn.Module):
    """The released ``SimpleMLPAdaLN``: residual blocks whose layer norms are modulated by time and condition.

    Args:
        target_dim: Channels of what it predicts.
        condition_dim: Channels of conditions.
        width: Width of everything between.
        depth: Residual blocks.

    Attributes:
        gradient_checkpointing: Recompute blocks in the backward pass.
    """

    def __init__(self, target_dim: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.time_embed = nn.ModuleDict({"mlp": _mlp(FREQUENCIES, width)})
        self.cond_embed = nn.Linear(condition_dim, width)
        self.input_proj = nn.Linear(target_dim, width)
        self.res_blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, target_dim)
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
        for layer in (*(layer.adaLN_modulation for layer in self._layers), self.final_layer.linear):
            nn.init.zeros_(next(layer.parameters()))

    def forward(self, x: Tensor, waves: Tensor, c: Tensor) -> Tensor:
        """Predict the velocity; leading dimensions broadcast.

        Args:
            x: ``[n, C]`` noised embeddings.
            waves: ``[n, 256]`` sinusoidal features of their timesteps.
            c: ``[n, Z]`` conditions.

        Returns:
            ``[n, C]``.
        """
        x, y = self._enter(x), self._embed(waves, c)
        for block in self.res_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, y, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, y)
        return self.final_layer(x, y)

    def modulations(self, waves: Tensor, c: Tensor) -> list[Tensor]:
        """What times and conditions do to every block and to the final layer; leading dimensions broadcast.

        That is three fifths of the weights, which a sampler that knows its timesteps needs once for all of them.

        Args:
            waves: ``[n, 256]`` sinusoidal features of timesteps.
            c: ``[n, Z]`` conditions.

        Returns:
            ``[n, 3 width]`` for each block, ``[n, 2 width]`` for the final layer.
        """
        y = self._embed(waves, c)
        return [layer.adaLN_modulation(y) for layer in self._layers]

    def modulated(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """`forward` of ``x [n, C]`` where times and conditions have become `modulations`."""
        x = self._enter(x)
        for layer, modulation in zip(self._layers, modulations, strict=True):
            x = layer.modulated(x, modulation)
        return x

    @property
    def _layers(self) -> "list[Block | FinalLayer]":
        return [*cast(Iterable[Block], self.res_blocks), self.final_layer]

    def _enter(self, x: Tensor) -> Tensor:
        return self.input_proj(x.to(self.input_proj.weight.dtype))

    def _embed(self, waves: Tensor, c: Tensor) -> Tensor:
        dtype = self.input_proj.weight.dtype
        return F.silu(self.time_embed["mlp"](waves.to(dtype)) + self.cond_embed(c.to(dtype)))


class Block(nn.Module):
    """A gated residual MLP behind a modulated layer norm.

    Args:
        width: Width of everything.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = LayerNorm(width, eps=1e-6)
        self.mlp = _mlp(width, width)
        self.adaLN_modulation = _modulation(width, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add to ``x [n, width]``; ``y [n, width]`` is the SiLU of the embedded time and condition."""
        return self.modulated(x, self.adaLN_modulation(y))

    def modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The same under ``modulation [n, 3 width]``: shift, scale and gate."""
        shift, scale, gate = modulation.chunk(3, -1)
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, self.in_ln(x), 1 + scale)))


class FinalLayer(nn.Module):
    """A modulated layer norm and the way back to embeddings.

    Args:
        width: Width of the MLP.
        target_dim: Channels of an embedding.
    """

    def __init__(self, width: int, target_dim: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, target_dim)
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Project ``x [n, width]``; ``y [n, width]`` is the SiLU of the embedded time and condition."""
        return self.modulated(x, self.adaLN_modulation(y))

    def modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The same under ``modulation [n, 2 width]``: shift and scale."""
        shift, scale = modulation.chunk(2, -1)
        return self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))


class LayerNorm(nn.LayerNorm):
    """A layer norm in the dtype of its input, whose moments are fp32 anyway.

    Mixed precision would make it, and all that modulates it, fp32: thrice the memory traffic for a product in bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., width]``."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = (None if own is None else own.to(x.dtype) for own in (self.weight, self.bias))
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def _modulation(width: int, parts: int) -> nn.Sequential:
    # The released layers have a SiLU in the first place, whose argument is the same for all of them.
    return nn.Sequential(nn.Identity(), nn.Linear(width, parts * width))

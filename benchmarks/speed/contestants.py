"""Diffusers' stock Wan transformer and ours, eager and compiled, set to the same task."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, get_args
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from bernini.attention import resolve_backend
from bernini.renderer.experts import Architecture
from bernini.renderer.packing import PackedSample, Segment, pack, target_patches
from bernini.renderer.recompute import Recompute
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.rope.op import VARIABLE, choose_kernel

PATCH = (1, 2, 2)

# Our names of attention backends as diffusers calls them.
STOCK_BACKENDS = {"cudnn": "_native_cudnn", "flash": "_native_flash", "math": "_native_math", "native": "native"}


def _recompute(way: str) -> Callable[[nn.Module], AbstractContextManager]:
    return lambda model: patch.object(model, "recompute", way)


VARIANTS: dict[str, Callable[[nn.Module], AbstractContextManager]] = {
    "reference": lambda _: patch.dict(os.environ, {VARIABLE: "reference"}),
    "compiled": lambda _: patch.dict(os.environ, {VARIABLE: "compiled"}),
    "outputs": lambda model: patch.object(model, "rope_saves", "outputs"),
    **{way: _recompute(way) for way in get_args(Recompute) if way != "full"},
}
"""Other ways for ours to compute the same: rotation by another kernel, or saving outputs, or recomputing less."""


@dataclass(frozen=True)
class Problem:
    """What all contestants compute.

    Attributes:
        architecture: Shape of the transformer.
        grid: Patches (T, H, W) of the one clip.
        text_rows: Rows of text features.
        dtype: Dtype that is computed in, but for what Wan keeps in fp32.
        device: Where it runs.
        seed: Seed of weights and data.
        weights: Dtype of the weights, if not the same: autocast then computes in ``dtype``.
    """

    architecture: Architecture
    grid: tuple[int, int, int]
    text_rows: int
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    weights: torch.dtype | None = None

    @property
    def attention(self) -> str:
        """Attention backend that ours chooses here, and stock is set to."""
        return resolve_backend("auto", self.device, self.dtype, self.architecture.attention_head_dim)

    @property
    def rope(self) -> str:
        """Kernel that ours rotates queries and keys with here."""
        return choose_kernel(self.device, self.architecture.attention_head_dim)

    def autocast(self) -> torch.autocast:
        """What turns weights into the dtype that is computed in."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.weights not in (None, self.dtype))

    @property
    def tokens(self) -> int:
        """Tokens of the clip."""
        t, h, w = self.grid
        return t * h * w

    def __str__(self) -> str:
        width = self.architecture.num_attention_heads * self.architecture.attention_head_dim
        t, h, w = self.grid
        dtype, weights = (str(own).removeprefix("torch.") for own in (self.dtype, self.weights or self.dtype))
        return (
            f"{self.architecture.num_layers} layers of width {width}, {self.tokens:,} tokens ({t} x {h} x {w}), "
            f"{self.text_rows} rows of text, {dtype}, {weights} weights, "
            f"{self.attention} attention, {self.rope} rotation"
        )

    def facts(self) -> dict[str, Any]:
        """The problem as JSON takes it."""
        facts = {"tokens": self.tokens, "dtype": str(self.dtype), "device": self.device.type}
        facts["weights"] = str(self.weights or self.dtype)
        return asdict(self) | facts | {"attention": self.attention, "rope": self.rope}

    def _draw(self, salt: int, *shape: int) -> Tensor:
        """Normal values that bf16 holds exactly, so that every dtype sees the same."""
        generator = torch.Generator(self.device).manual_seed(self.seed + salt)
        return torch.randn(shape, generator=generator, device=self.device).bfloat16().to(self.dtype)

    @cached_property
    def latent(self) -> Tensor:
        """``[C, T, H, W]`` random latent."""
        size = [n * p for n, p in zip(self.grid, PATCH, strict=True)]
        return self._draw(1, self.architecture.in_channels, *size)

    @cached_property
    def velocity(self) -> Tensor:
        """``[C, T, H, W]`` what the model is to predict, fp32."""
        return self._draw(2, *self.latent.shape).float()

    @cached_property
    def context(self) -> Tensor:
        """``[text_rows, text_dim]`` random text features."""
        return self._draw(3, self.text_rows, self.architecture.text_dim)

    @cached_property
    def timestep(self) -> Tensor:
        """``[1]``, in 0..1000."""
        return torch.full((1,), 500.0, device=self.device)


class Contestant:
    """One model, of which all share weights and optimizer.

    Args:
        name: For the table.
        model: The transformer.
        forward: Calls it; the result's layout is the contestant's own.
        target: The velocity in that layout.
        rows_of: Turns a result into ``[tokens, patch volume * C]``, our layout.
        optimizer: Updates the weights.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        forward: Callable[[], Tensor],
        target: Tensor,
        rows_of: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.name, self.model = name, model
        self._forward, self._target, self._rows_of = forward, target, rows_of
        self.optimizer = optimizer

    @property
    def ours(self) -> bool:
        """Whether this is the packed model."""
        return isinstance(self.model, PackedWanTransformer3DModel)

    def varied(self, variant: str) -> "Contestant":
        """The same model with the same optimizer, whose forwards run under one of `VARIANTS`."""
        other, forward = copy(self), self._forward

        def vary() -> Tensor:
            with VARIANTS[variant](self.model):
                return forward()

        other.name, other._forward = f"{self.name}, {variant}", vary
        return other

    @property
    def resident(self) -> int:
        """Bytes of weights and optimizer states."""
        states = [v for state in self.optimizer.state.values() for v in state.values()]
        return sum(t.nbytes for t in (*self.model.parameters(), *states))

    def step(self) -> None:
        """One training step; gradients are dropped whatever becomes of it."""
        try:
            self._step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _step(self) -> None:
        F.mse_loss(self._forward().float(), self._target).backward()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self) -> Tensor:
        """One forward pass: ``[tokens, patch volume * C]``."""
        return self._rows_of(self._forward())

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Output as from :meth:`infer`, and all gradients of the loss laid end to end, by parameter name."""
        output = self._forward()
        F.mse_loss(output.float(), self._target).backward()
        named = dict(self.model.named_parameters())
        gradients = torch.cat([p.grad.flatten() for _, p in sorted(named.items()) if p.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        return self._rows_of(output.detach()), gradients


def contestants(problem: Problem, compiler: str | None, variants: Iterable[str] = ()) -> list[Contestant]:
    """Stock and ours, eager and compiled, with the same attention, and stock eager with torch's own choice of it.

    All recompute every block. They hold the same weights, so that several fit a device.

    Args:
        problem: What they compute.
        compiler: Backend of ``torch.compile``; ``None`` leaves the compiled ones out.
        variants: `VARIANTS` in which ours runs too, eager and compiled.
    """
    backend = STOCK_BACKENDS[problem.attention]
    first = _stock("stock eager", problem, backend)
    weights = dict(first.model.named_parameters())
    rivals = [first, _ours("ours eager", problem, weights, first.optimizer)]
    if compiler is not None:
        rivals.append(_stock("stock compiled", problem, backend, weights, first.optimizer, compiler))
        rivals.append(_ours("ours compiled", problem, weights, first.optimizer, compiler))
    rivals.append(_stock("stock default attention", problem, "native", weights, first.optimizer))
    return rivals + [rival.varied(name) for name in variants for rival in rivals if rival.ours]


def stock_reference(problem: Problem, weights: Mapping[str, Tensor]) -> Tensor:
    """Output of stock in fp32 with the given weights: ``[tokens, patch volume * C]``."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return _stock("reference", replace(problem, dtype=torch.float32, weights=None), "native", weights).infer()


def _stock(
    name: str,
    problem: Problem,
    backend: str,
    weights: Mapping[str, Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    compiler: str | None = None,
) -> Contestant:
    model = build(WanTransformer3DModel, problem, weights, compiler)
    model.set_attention_backend(backend)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def forward() -> Tensor:
        with problem.autocast():
            return model(problem.latent[None], problem.timestep, problem.context[None], return_dict=False)[0]

    target = problem.velocity[None]
    return Contestant(name, model, forward, target, lambda out: target_patches(out[0], PATCH), optimizer)


def _ours(
    name: str,
    problem: Problem,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    compiler: str | None = None,
) -> Contestant:
    model = build(PackedWanTransformer3DModel, problem, weights, compiler)
    model.disable_gradient_checkpointing()
    model.recompute = "full"
    packed = pack([PackedSample([Segment(problem.latent, 0)], problem.context, problem.timestep.item())], PATCH)

    def forward() -> Tensor:
        with problem.autocast():
            return model(packed)

    return Contestant(name, model, forward, target_patches(problem.velocity, PATCH), lambda out: out, optimizer)


def build(cls: Any, problem: Problem, weights: Mapping[str, Tensor] | None, compiler: str | None) -> Any:
    """A model as ``from_pretrained`` leaves it: some modules in fp32, the rest in the problem's dtype."""
    torch.manual_seed(problem.seed)
    architecture = problem.architecture
    with problem.device:
        model = cls(**architecture.arguments())
    for name, parameter in model.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            nn.init.constant_(parameter, 2.0)  # scores spread enough for attention to matter
        elif name.endswith("scale_shift_table"):
            nn.init.normal_(parameter, std=0.3)  # gates wide enough for every block to show in the output
        if not set(name.split(".")) & set(cls._keep_in_fp32_modules):
            parameter.data = parameter.data.to(problem.weights or problem.dtype)
    if weights is not None:
        own = dict(model.named_parameters())
        shared = all(own[name].dtype == weight.dtype for name, weight in weights.items() if name in own)
        model.load_state_dict(weights, assign=shared)
    model.enable_gradient_checkpointing()
    if compiler is not None:
        model.compile_repeated_blocks(backend=compiler)
    return model

"""How much memory a training step of the renderer takes, reckoned from shapes, and the fastest recomputation that fits.

What a block keeps for the backward pass has been counted (tests/bernini/test_memory.py). For each token it is, with
``d`` the width, ``f`` that of the feed-forward, ``h`` the heads and ``a`` bytes of an activation,

- ``none``: ``(13 a + 28) d + 2 a f + 8 h + 36``, as norms and gates keep fp32; compiled ``16 a d + 2 a f + 8 h + 36``;
- ``pointwise``: ``10 a d + a f + 8 h``: the input, all products, attention's output and row sums;
- ``attention``: ``3 a d + 8 h``: the input, attention's output and row sums;
- ``full``: ``a d``, the input; ``offload``: the same of two blocks at a time.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from bernini.errors import ConfigError
from bernini.renderer.experts import Architecture
from bernini.renderer.recompute import Recompute
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.sharding import weights_mesh

if TYPE_CHECKING:
    import lightning as L

Choice = Literal["auto", "none", "pointwise", "attention", "full", "offload"]
"""A way to recompute, or ``auto``, the fastest that fits the device."""

GIB = 2**30
ROOM = 0.94  # of a device's memory; the rest is for CUDA itself, workspaces and gaps
FP32, HALF = 4, 2


@dataclass(frozen=True)
class States:
    """Bytes that a step holds besides activations.

    Attributes:
        weights: Weights as they are stored.
        casts: Copies of fp32 weights that autocast makes.
        gradients: Of what is trained, fp32.
        optimizer: Its states.
        average: The moving average of what is trained.
    """

    weights: int
    casts: int
    gradients: int
    optimizer: int
    average: int

    @classmethod
    def of(
        cls,
        models: Sequence[nn.Module],
        mixed: bool = True,
        optimizer: int = 2 * FP32,
        average: bool = False,
        shards: int = 1,
    ) -> "States":
        """States of transformers, which may be on the meta device.

        Args:
            models: The transformers; what is trained of them needs gradients.
            mixed: Autocast computes in half precision.
            optimizer: Bytes of states for each trained weight; Adam's are two floats.
            average: A moving average is kept.
            shards: Ranks that share weights and states.
        """
        parameters = [p for model in models for p in model.parameters()]
        trained = sum(p.numel() for p in parameters if p.requires_grad) // shards
        # The experts are computed one after another; the largest one's casts are the most at a time.
        casts = [sum(p.numel() for p in m.parameters() if p.dtype == torch.float32) for m in models]
        return cls(
            weights=sum(p.numel() * p.element_size() for p in parameters) // shards,
            casts=HALF * max(casts) // shards if mixed else 0,
            gradients=FP32 * trained,
            optimizer=optimizer * trained,
            average=FP32 * trained if average else 0,
        )


@dataclass(frozen=True)
class Activations:
    """Bytes that the blocks hold in a step.

    Attributes:
        kept: At the end of the forward pass, by way to recompute.
        head: What the last norm and projection keep besides.
        working: What the backward pass of one block adds to that.
        again: What it adds where products are computed again, too.
    """

    kept: dict[Recompute, int]
    head: int
    working: int
    again: int

    @classmethod
    def of(cls, shape: Architecture, tokens: int, compiled: bool = False, activation: int = HALF) -> "Activations":
        """Activations of one transformer.

        Args:
            shape: Its shape.
            tokens: Tokens of a pack.
            compiled: The blocks are compiled.
            activation: Bytes of an activation.
        """
        d, f, h = shape.num_attention_heads * shape.attention_head_dim, shape.ffn_dim, shape.num_attention_heads
        sums = 2 * FP32 * h
        wide = 16 * activation * d if compiled else (13 * activation + 7 * FP32) * d
        none = wide + 2 * activation * f + sums + 9 * FP32
        each: dict[Recompute, int] = {
            "none": none,
            "pointwise": 10 * activation * d + activation * f + sums,
            "attention": 3 * activation * d + sums,
            "full": activation * d,
        }
        kept: dict[Recompute, int] = {way: tokens * shape.num_layers * size for way, size in each.items()}
        kept["offload"] = tokens * 2 * activation * d
        head = (2 * FP32 + activation) * d
        working = none + 4 * activation * d + 2 * activation * f
        again = 3 * activation * f if compiled else 0  # by measurement: compiled code lets go of less
        return cls(kept, tokens * head, tokens * working, tokens * again)


def fastest(need: dict[Recompute, int], room: float) -> Recompute:
    """The way that recomputes least of those that fit, or else that which needs least.

    Args:
        need: Bytes by way.
        room: Bytes that are free.
    """
    return next((way for way in get_args(Recompute) if need[way] <= room), "offload")


def needs(states: States, activations: Activations, accumulates: bool) -> dict[Recompute, int]:
    """Bytes of a step at its worst moment, by way to recompute.

    Args:
        states: Of all transformers.
        activations: Of one of them.
        accumulates: A step is several batches, through which gradients stay; else they are dropped before the backward
            pass, as Lightning does it, when activations are the most.
    """
    held = sum(vars(states).values()) - states.gradients + activations.head

    def passing(way: Recompute) -> int:
        working = activations.working + (0 if way in ("none", "pointwise") else activations.again)
        return states.gradients + working if accumulates else max(states.gradients, working)

    return {way: held + passing(way) + kept for way, kept in activations.kept.items()}


def choose(need: dict[Recompute, int], tokens: int, free: int) -> tuple[Recompute, str]:
    """What ``auto`` is.

    Args:
        need: Bytes of a step by way.
        tokens: Tokens of a pack.
        free: Bytes that the step may take.

    Returns:
        The way, and a line that says why.
    """
    way = fastest(need, ROOM * free)
    told = ", ".join(f"{name} {size / GIB:.1f}" for name, size in need.items())
    fits = "" if need[way] <= ROOM * free else "; NONE FITS, lower data.init_args.pack.tokens"
    return way, f"recompute: {way}, at {tokens:,} tokens a pack; GiB needed: {told}; there: {free / GIB:.1f}{fits}"


def settle(module: "L.LightningModule", models: Sequence[PackedWanTransformer3DModel], compiled: bool) -> None:
    """Choose at the start of training how its transformers recompute, and say it. Every rank has to call.

    Args:
        module: What trains, on its device and with its optimizer.
        models: Its transformers.
        compiled: Their blocks are compiled.

    Raises:
        ConfigError: The data have no budget of tokens.
    """
    trainer, device = module.trainer, module.device
    pack = getattr(getattr(trainer, "datamodule", None), "pack", None)
    if pack is None:
        raise ConfigError(
            "what to recompute cannot be chosen",
            where="model.init_args.recompute: auto",
            why="what a step takes depends on its tokens, and the data have no budget of them",
            fix="set data.init_args.pack.tokens (configs/data/packs.yaml), or recompute: full",
        )
    mesh = module.device_mesh
    mixed = "mixed" in str(trainer.precision)
    adam = any("betas" in optimizer.defaults for optimizer in trainer.optimizers)
    states = States.of(
        models,
        mixed and not compiled,
        2 * FP32 if adam else FP32,
        shards=1 if mesh is None else weights_mesh(module).shape[-1],
    )
    half = (
        mixed or (mesh is not None and device.type == "cuda") or models[0].patch_embedding.weight.dtype.itemsize == HALF
    )
    shape = Architecture.of(models[0].config)
    tokens = models[0].axis.slice(pack.tokens).size
    activations = Activations.of(shape, tokens, compiled, HALF if half else FP32)
    free = torch.tensor(_free(device), device=device)
    if dist.is_initialized():
        dist.all_reduce(free, dist.ReduceOp.MIN)  # ranks that gather weights together recompute alike
    need = needs(states, activations, trainer.accumulate_grad_batches > 1)
    way, told = choose(need, tokens, int(free) + states.weights)
    rank_zero_info(told)
    for model in models:
        model.recompute = way


def _free(device: torch.device) -> int:
    """Bytes of a device that tensors can have."""
    if device.type != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached

"""Ulysses: ranks hold slices of a sequence, and swap tokens for heads around self-attention (Jacobs et al. 2023).

Each rank of the axis is given the same pack and computes a slice of its tokens; what a model returns is whole again on
every rank, so losses and samplers know nothing of slices. Gradients are scaled so that their mean over all ranks, of
this axis and of the data axis, is the gradient of the mean loss: of parameters that see slices, and of others alike.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from bernini.attention import Lengths
from bernini.errors import ConfigError

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Axis:
    """The ranks that hold one sequence together; alone by default.

    Attributes:
        rank: This rank's place among them.
        ranks: How many they are.
        group: Name of their process group.
    """

    rank: int = 0
    ranks: int = 1
    group: str = ""

    @classmethod
    def of(cls, mesh: DeviceMesh, heads: int) -> "Axis":
        """The second axis of Lightning's mesh.

        Args:
            mesh: Lightning's mesh of ``data_parallel`` and ``tensor_parallel``.
            heads: Attention heads of the model, which the ranks divide.

        Raises:
            ConfigError: The heads cannot be divided equally.
        """
        axis = mesh["tensor_parallel"]
        if axis.size() == 1:
            return cls()
        if heads % axis.size():
            raise ConfigError(
                f"{heads} heads cannot be divided between {axis.size()} ranks",
                where="trainer.strategy.init_args.tensor_parallel_size",
                why="under Ulysses each rank attends with its share of the heads",
                fix=f"use a divisor of {heads}",
            )
        return cls(axis.get_local_rank(), axis.size(), axis.get_group().group_name)

    def slice(self, tokens: int) -> "Slice":
        """This rank's slice of a sequence."""
        return Slice(self, tokens)

    def shared(self, x: Tensor) -> Tensor:
        """What all ranks of the axis have made alike and read with their slices; its gradient is the same on all."""
        return x if self.ranks == 1 else _Shared.apply(x, self)


@contextmanager
def apart(models: Iterable[Any]) -> Iterator[None]:
    """Let every rank compute whole packs of its own; ranks that share weights still have to call equally often."""
    kept = [(model, model.axis) for model in models]
    for model, _ in kept:
        model.axis = Axis()
    try:
        yield
    finally:
        for model, axis in kept:
            model.axis = axis


@dataclass(frozen=True)
class Slice:
    """A rank's part of a sequence. All are as long as the longest, the last ones filled up.

    Attributes:
        axis: The ranks; one alone has all tokens, however many.
        tokens: Length of the sequence.
    """

    axis: Axis = Axis()
    tokens: int = 0

    @property
    def size(self) -> int:
        """Tokens of a slice, with what fills it up."""
        return -(-self.tokens // self.axis.ranks)

    @property
    def start(self) -> int:
        """Number of the first token."""
        return self.axis.rank * self.size

    def cut(self, x: Tensor, fill: int = 0, dim: int = 0) -> Tensor:
        """This rank's rows ``[size, ...]`` of ``[tokens, ...]``, or of another dimension."""
        if self.axis.ranks == 1:
            return x
        first = min(self.start, self.tokens)
        own = x.narrow(dim, first, min(self.size, self.tokens - first))
        return F.pad(own, [0, 0] * (x.ndim - 1 - dim) + [0, self.size - own.shape[dim]], value=fill)

    def whole(self, x: Tensor) -> Tensor:
        """The rows ``[tokens, ...]`` of all ranks from this one's ``[size, ...]``; see the module for gradients."""
        return x if self.axis.ranks == 1 else _Gather.apply(x, self.axis)[: self.tokens]

    def swap_tokens_for_heads(self, *heads: Tensor) -> Sequence[Tensor]:
        """Some heads of all tokens ``[tokens, heads / ranks, head_dim]`` from ``[size, heads, head_dim]``, of each."""
        if self.axis.ranks == 1:
            return heads
        parts = torch.stack([x.unflatten(1, (self.axis.ranks, -1)).transpose(0, 1) for x in heads], dim=2)
        return _Swap.apply(parts, self.axis).flatten(0, 1)[: self.tokens].unbind(1)

    def swap_heads_for_tokens(self, x: Tensor) -> Tensor:
        """All heads of a slice ``[size, heads, head_dim]`` from ``[tokens, heads / ranks, head_dim]``."""
        if self.axis.ranks == 1:
            return x
        filled = F.pad(x, (0, 0, 0, 0, 0, self.axis.ranks * self.size - self.tokens))
        parts = _Swap.apply(filled.unflatten(0, (self.axis.ranks, -1)).contiguous(), self.axis)
        return parts.transpose(0, 1).flatten(1, 2)

    def readers(
        self, lengths: Lengths | None, contexts: Sequence[Tensor | KeysValues]
    ) -> tuple[Lengths | None, Sequence[Tensor | KeysValues]]:
        """Cross-attention of a slice: how many of its tokens read each context, and the rows that any of them reads.

        Args:
            lengths: Tokens of the sequence that read each context, and its rows; ``None`` for a single context.
            contexts: For each block ``[rows, ...]``, or keys and values of that.
        """
        if self.axis.ranks == 1 or lengths is None:
            return lengths, contexts
        ends = [*accumulate(tokens for tokens, _ in lengths.pairs)]
        ends[-1] = self.axis.ranks * self.size  # what fills slices up reads the last context
        stop = self.start + self.size
        own = [min(end, stop) - max(begin, self.start) for begin, end in zip([0, *ends], ends, strict=False)]
        read = [number for number, tokens in enumerate(own) if tokens > 0]
        first = sum(rows for _, rows in lengths.pairs[: read[0]])
        pairs = [(own[number], lengths.pairs[number][1]) for number in read]
        rows = slice(first, first + sum(count for _, count in pairs))
        found = Lengths.of(pairs, lengths.q_starts.device)
        found.seen = None if lengths.seen is None else lengths.seen[rows]
        return found, [x[rows] if isinstance(x, Tensor) else (x[0][rows], x[1][rows]) for x in contexts]


ALONE = Slice()
"""All tokens, of a rank that holds them alone."""

# -- collectives whose gradients are those of the module's docstring ---------------------------------------------------
# They are functional ones, for compilers trace these, and selective checkpointing knows them by name.


def _wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


def _swap(parts: Tensor, axis: Axis) -> Tensor:
    sizes = [1] * axis.ranks
    return _wait(torch.ops._c10d_functional.all_to_all_single(parts, sizes, sizes, axis.group))


class _Swap(torch.autograd.Function):
    """``[ranks, ...]``: the part of each rank goes there, and the part from each rank lies in its place."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _swap(parts, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _swap(grad.contiguous(), ctx.axis), None


class _Gather(torch.autograd.Function):
    """``[ranks * size, ...]`` from ``[size, ...]``; all ranks derive one loss from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _wait(torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), axis.ranks, axis.group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.chunk(ctx.axis.ranks)[ctx.axis.rank] * ctx.axis.ranks, None


class _Shared(torch.autograd.Function):
    """The identity; the gradient is the mean over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = _wait(torch.ops._c10d_functional.all_reduce(grad.contiguous(), "sum", ctx.axis.group))
        return total / ctx.axis.ranks, None

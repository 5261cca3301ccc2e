"""Prepared samples stacked in the memory of a device: whole batches are gathered from it, without work per sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bernini.errors import DataError
from bernini.files import replacing


@dataclass(frozen=True)
class Stack:
    """Samples of one task whose media have the same sizes.

    Attributes:
        task: Name in the task table.
        sources: Posteriors ``[N, 2C, t, h, w]`` of each source, in the order in which they are numbered.
        target: Posteriors ``[N, 2C, t, h, w]``.
        text: Text features ``[N, rows, dim]``, filled up with zero rows.
        dropped: Features ``[rows, dim]`` of a sample whose text is dropped.
    """

    task: str
    sources: tuple[Tensor, ...]
    target: Tensor
    text: Tensor
    dropped: Tensor

    def __len__(self) -> int:
        return len(self.target)


def save_stacks(path: Path, stacks: Sequence[Stack], made_from: str) -> None:
    """Write stacks as one safetensors file.

    Args:
        path: File to write.
        stacks: What it holds.
        made_from: Whatever decides the stacks; `load_stacks` compares it.
    """
    tensors: dict[str, Tensor] = {}
    for number, stack in enumerate(stacks):
        named = {"target": stack.target, "text": stack.text, "dropped": stack.dropped}
        named |= {f"source{place}": source for place, source in enumerate(stack.sources)}
        tensors |= {f"{number}.{name}": tensor.contiguous() for name, tensor in named.items()}
    kinds = " ".join(f"{stack.task}:{len(stack.sources)}" for stack in stacks)
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"kinds": kinds, "made_from": made_from})


def load_stacks(path: Path, device: torch.device, made_from: str) -> list[Stack]:
    """Read what `save_stacks` wrote onto a device.

    Raises:
        DataError: The file is damaged, is something else, or was made from something else.
    """
    fix = "delete the file to have it made anew, or name another one"
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            told = file.metadata() or {}
            if told.get("made_from") != made_from:
                why = f"it was made from {told.get('made_from')}, not {made_from}"
                raise DataError("the file holds other samples", where=str(path), why=why, fix=fix)
            found = []
            for number, kind in enumerate(told["kinds"].split()):
                task, _, count = kind.partition(":")
                target, text, dropped, *sources = (
                    file.get_tensor(f"{number}.{name}")
                    for name in ("target", "text", "dropped", *(f"source{place}" for place in range(int(count))))
                )
                found.append(Stack(task, tuple(sources), target, text, dropped))
    except SafetensorError as error:
        raise DataError("the file of samples cannot be read", where=str(path), why=str(error), fix=fix) from error
    return found


@dataclass(frozen=True)
class Bank:
    """Stacks, and how many samples of each make a batch.

    Attributes:
        stacks: The samples.
        counts: Samples of each stack in every batch.
    """

    stacks: tuple[Stack, ...]
    counts: tuple[int, ...]

    @property
    def batch_size(self) -> int:
        """Samples of a batch."""
        return sum(self.counts)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Rows ``[batch_size]`` of a batch as rows of each stack."""
        ends = list(accumulate(self.counts))
        return [rows[end - count : end] for end, count in zip(ends, self.counts, strict=True)]


@dataclass(frozen=True)
class Rows:
    """One batch of a bank.

    Attributes:
        rows: ``[batch_size]`` int64, sample numbers within the stacks, one stack's after the other's.
        cursor: Where the data order stands after this batch.
    """

    rows: Tensor
    cursor: dict[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: object, non_blocking: bool = False) -> "Rows":
        """Stay where it is: the module copies the rows to where its graph reads them."""
        return self

"""Prepared samples of one kind stacked, and files of such stacks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bernini.bank import load_tensors, save_tensors


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
        tensors |= {f"{number}.{name}": tensor for name, tensor in named.items()}
    kinds = " ".join(f"{stack.task}:{len(stack.sources)}" for stack in stacks)
    save_tensors(path, tensors, made_from, kinds=kinds)


def load_stacks(path: Path, device: torch.device, made_from: str) -> list[Stack]:
    """Read what `save_stacks` wrote onto a device.

    Raises:
        DataError: The file is damaged, is something else, or was made from something else.
    """
    tensors, told = load_tensors(path, device, made_from)
    found = []
    for number, kind in enumerate(told["kinds"].split()):
        task, _, count = kind.partition(":")
        target, text, dropped, *sources = (
            tensors[f"{number}.{name}"]
            for name in ("target", "text", "dropped", *(f"source{place}" for place in range(int(count))))
        )
        found.append(Stack(task, tuple(sources), target, text, dropped))
    return found

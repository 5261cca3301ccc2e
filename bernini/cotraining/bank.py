"""Samples for planner and renderer at once, in a device's memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bernini.bank import Bank, load_tensors, save_tensors
from bernini.planner.bank import PlanStack
from bernini.renderer.bank import Stack, load_stacks, save_stacks

PLANS, CLIPS, NUMBERS = "plans.safetensors", "clips.safetensors", "numbers.safetensors"


@dataclass(frozen=True)
class CoStack:
    """Samples of one kind.

    Attributes:
        numbers: ``[N]`` int64, their numbers in the planner's stack.
        clips: The same samples as the renderer learns them; null where there is nothing to render.
    """

    numbers: Tensor
    clips: Stack | None = None

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class CoBank(Bank[CoStack]):
    """Samples of all kinds; those with something to render come first.

    Attributes:
        plans: All samples as the planner reads them.
    """

    plans: PlanStack

    @property
    def clips(self) -> Bank[Stack]:
        """The part of it that the renderer learns: the first rows of a batch."""
        stacks = tuple(stack.clips for stack in self.stacks if stack.clips is not None)
        return Bank(stacks, self.counts[: len(stacks)])

    def numbers(self, rows: Tensor) -> Tensor:
        """Numbers ``[batch_size]`` in the planner's stack of the rows of a batch."""
        parts = zip(self.stacks, self.split(rows), strict=True)
        return torch.cat([stack.numbers[own] for stack, own in parts])


def save_costacks(folder: Path, plans: PlanStack, stacks: Sequence[CoStack], made_from: str) -> None:
    """Write what a bank holds into a folder; ``made_from`` is whatever decides it, which `load_costacks` compares."""
    folder.mkdir(parents=True, exist_ok=True)
    plans.save(folder / PLANS, made_from)
    save_stacks(folder / CLIPS, [stack.clips for stack in stacks if stack.clips is not None], made_from)
    # Last: where it is, the others are.
    save_tensors(folder / NUMBERS, {str(place): stack.numbers for place, stack in enumerate(stacks)}, made_from)


def load_costacks(folder: Path, device: torch.device, made_from: str) -> tuple[PlanStack, list[CoStack]]:
    """Read what `save_costacks` wrote onto a device.

    Raises:
        DataError: A file is damaged, is something else, or was made from something else.
    """
    numbers, _ = load_tensors(folder / NUMBERS, device, made_from)
    clips: list[Stack | None] = [*load_stacks(folder / CLIPS, device, made_from)]
    clips += [None] * (len(numbers) - len(clips))
    stacks = [CoStack(numbers[str(place)], own) for place, own in enumerate(clips)]
    return PlanStack.load(folder / PLANS, device, made_from), stacks

"""A bank: prepared samples in the memory of a device, of which a batch takes rows, without work per sample."""

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bernini.errors import DataError
from bernini.files import replacing

S = TypeVar("S", bound=Sized)


@dataclass(frozen=True)
class Bank(Generic[S]):
    """Stacks of samples, and how many samples of each make a batch.

    Attributes:
        stacks: The samples.
        counts: Samples of each stack in every batch.
    """

    stacks: tuple[S, ...]
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


def save_tensors(path: Path, tensors: Mapping[str, Tensor], made_from: str, **told: str) -> None:
    """Write tensors of a bank as one safetensors file.

    Args:
        path: File to write.
        tensors: What it holds.
        made_from: Whatever decides them; `load_tensors` compares it.
        **told: What else to keep.
    """
    with replacing(path) as temporary:
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary, {**told, "made_from": made_from})


def load_tensors(path: Path, device: torch.device, made_from: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote onto a device: the tensors, and what else was kept.

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
            return {name: file.get_tensor(name) for name in file.keys()}, told  # noqa: SIM118  it is no mapping
    except SafetensorError as error:
        raise DataError("the file of samples cannot be read", where=str(path), why=str(error), fix=fix) from error

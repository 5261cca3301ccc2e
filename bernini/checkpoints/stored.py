"""Tensors in safetensors files, known by their headers: what a folder holds, before any of it is read."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bernini.errors import CheckpointError

STEMS = ("model", "diffusion_pytorch_model")
"""How the names of weight files begin, as transformers and diffusers have them."""
AVERAGE = "ema."
"""Begins the name of a moving average beside, or instead of, the weight that it averages."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes that are turned into each other, by their names in safetensors; all others stay as they are."""
AGAIN = "copy or download the folder again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: Its file.
        name: Its name there.
        dtype: Name of its dtype there, such as ``BF16``.
        shape: Its shape.
        start: First byte of its values in the file.
        size: Bytes of its values.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @cached_property
    def itemsize(self) -> int:
        """Bytes of a value, one where several share a byte."""
        return max(1, self.size // max(1, prod(self.shape)))


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in the file's order; no value is read.

    Raises:
        CheckpointError: The file is cut short or otherwise damaged.
    """
    try:
        with safe_open(file, "pt"):
            pass  # which holds names, dtypes, shapes and offsets against each other and against the file's length
    except SafetensorError as error:
        raise CheckpointError(
            "a file of weights is cut short or damaged",
            where=str(file),
            why=f"it has {file.stat().st_size:,} bytes; {error}",
            fix=AGAIN,
        ) from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    tensors = (
        StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    )
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.start)}


def read_folder(folder: Path, begin: tuple[str, ...] = ("",)) -> dict[str, StoredTensor]:
    """The tensors of a folder, in one file or in several with an index.

    Args:
        folder: With ``model.safetensors`` or ``diffusion_pytorch_model.safetensors``, or an index in its place.
        begin: How the names of the tensors begin that are asked for; shards without any of them are not looked at.

    Returns:
        Tensors by name, without ``ema.``: where a weight and its moving average are both there, the average. Empty if
        the folder is not there, or has no such weights.

    Raises:
        CheckpointError: A file is not there or damaged, weights are there twice, or an index and its shards do not
            agree.
    """
    found: dict[str, StoredTensor] = {}
    for stem in STEMS:
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            shards = _weight_map(index)
            if single.is_file() and single.name not in shards.values():
                raise CheckpointError(
                    "weights are there twice",
                    where=str(folder),
                    why=f"{single.name} is not among the files of {index.name}",
                    fix="remove the ones that are not wanted",
                )
            asked = {file for name, file in shards.items() if name.removeprefix(AVERAGE).startswith(begin)}
            for file in sorted(asked):
                found |= _shard(index, file, {name for name, other in shards.items() if other == file})
            break
        if single.is_file():
            found = read_header(single)
            break
    weights = {name: tensor for name, tensor in found.items() if not name.startswith(AVERAGE)}
    averages = {name.removeprefix(AVERAGE): tensor for name, tensor in found.items() if name.startswith(AVERAGE)}
    return {name: tensor for name, tensor in (weights | averages).items() if name.startswith(begin)}


def _weight_map(index: Path) -> dict[str, str]:
    """The index's map from tensors to files."""
    try:
        shards = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in shards.values()):
            raise ValueError("its files have to lie beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "an index of weights cannot be read",
            where=str(index),
            why=f"{type(error).__name__}: {error}",
            fix=AGAIN,
        ) from error
    return shards


def _shard(index: Path, file: str, names: set[str]) -> dict[str, StoredTensor]:
    """The tensors of a shard, which have to be exactly those that the index names."""
    shard = index.parent / file
    if not shard.is_file():
        why = f"{index.name} says that it holds {len(names)} tensors, e.g. {min(names)}"
        raise CheckpointError("a file of weights is not there", where=str(shard), why=why, fix=AGAIN)
    tensors = read_header(shard)
    if wrong := sorted(tensors.keys() ^ names):
        where = "the index but not in the shard" if wrong[0] in names else "the shard but not in the index"
        raise CheckpointError(
            "an index and a shard do not agree",
            where=f"{index}, {file}",
            why=f"{len(wrong)} tensors are in one of them alone; {wrong[0]} is in {where}",
            fix=AGAIN,
        )
    return tensors


def load(tensors: Mapping[str, StoredTensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Read tensors, under the names that they are given, in ``dtype``."""
    loaded: dict[str, Tensor] = {}
    by_file = sorted(tensors.items(), key=lambda item: item[1].file)
    for file, items in groupby(by_file, key=lambda item: item[1].file):
        with safe_open(file, "pt") as opened:
            loaded |= {name: opened.get_tensor(tensor.name).to(dtype) for name, tensor in items}
    return loaded


def check_fit(
    what: str,
    where: Path,
    tensors: Mapping[str, StoredTensor],
    expected: Mapping[str, torch.Size],
    optional: Iterable[str] = (),
) -> None:
    """Hold tensors against the names and shapes that a configuration asks for.

    Args:
        what: What they make up, for the error.
        where: Its configuration, for the error.
        tensors: Tensors by name.
        expected: Shapes by name.
        optional: Names that may be missing, such as those of tied weights.

    Raises:
        CheckpointError: One is missing, unknown or has another shape.
    """
    missing = sorted(expected.keys() - tensors.keys() - {*optional})
    unknown = sorted(tensors.keys() - expected.keys())
    misshapen = sorted(name for name in tensors.keys() & expected.keys() if tensors[name].shape != expected[name])
    told = [
        f"{len(names)} {kind}, e.g. {names[0]}" for kind, names in (("missing", missing), ("unknown", unknown)) if names
    ]
    if misshapen:
        tensor, shape = tensors[misshapen[0]], list(expected[misshapen[0]])
        told.append(
            f"{len(misshapen)} misshapen, e.g. {misshapen[0]}, which is {list(tensor.shape)} in {tensor.file.name} "
            f"and should be {shape}"
        )
    if told:
        raise CheckpointError(
            f"the {what} does not have the tensors of its configuration",
            where=str(where),
            why="; ".join(told),
            fix="use a configuration and weights that belong together",
        )

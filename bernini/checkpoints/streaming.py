"""Writing safetensors straight from other safetensors: whatever their size, a few megabytes are held at a time."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from bernini.checkpoints.stored import DTYPES, StoredTensor
from bernini.errors import CheckpointError
from bernini.files import replacing

CHUNK = 2**24  # bytes that are held at a time
SHARD = 5 * 10**9  # bytes of a file at most, unless a single tensor is larger
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_sharded(folder: Path, stem: str, tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> None:
    """Write tensors as one file, or as several with an index, named as transformers and diffusers do.

    Args:
        folder: Where to.
        stem: How the files' names begin.
        tensors: What to write, by its new name.
        dtype: Dtype of floating-point tensors; each its own if null.
    """
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: _entry(tensor, dtype)[1],
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=SHARD,
    )
    for file, names in plan.filename_to_tensors.items():
        write(folder / file, {name: tensors[name] for name in names}, dtype)
    if plan.is_sharded:
        with replacing(folder / f"{stem}.safetensors.index.json") as temporary:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write(file: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> None:
    """Write tensors as one safetensors file, which appears when it is complete; holes of sparse files stay holes.

    Args:
        file: Where to.
        tensors: What to write, by its new name.
        dtype: Dtype of floating-point tensors; each its own if null.
    """
    entries = {name: _entry(tensor, dtype) for name, tensor in tensors.items()}
    # The widest values first, which keeps every tensor aligned.
    order = sorted(tensors, key=lambda name: -entries[name][1] // max(1, prod(tensors[name].shape)))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        kind, size = entries[name]
        header[name] = {"dtype": kind, "shape": tensors[name].shape, "data_offsets": [end, end + size]}
        end += size
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)
    with replacing(file) as temporary, temporary.open("wb") as target:
        target.write(len(written).to_bytes(8, "little") + written)
        start = target.tell()
        for name in order:
            _copy(tensors[name], target, start, entries[name][0])
            start += entries[name][1]
        target.truncate(start)


def _entry(tensor: StoredTensor, dtype: torch.dtype | None) -> tuple[str, int]:
    """Dtype and bytes of a tensor as it will be written."""
    if dtype is None or tensor.dtype not in DTYPES:
        return tensor.dtype, tensor.size
    return NAMES[dtype], prod(tensor.shape) * dtype.itemsize


def _copy(tensor: StoredTensor, target: BinaryIO, start: int, kind: str) -> None:
    """Write the values of a tensor at ``start``, all but those that are holes."""
    stop = tensor.start + tensor.size
    with tensor.file.open("rb") as source:
        for begin, end in _extents(source.fileno(), tensor.start, stop):
            # Whole values, counted from the first one.
            first = (begin - tensor.start) // tensor.itemsize * tensor.itemsize
            last = tensor.size - (stop - end) // tensor.itemsize * tensor.itemsize
            for at in range(first, last, CHUNK):
                chunk = bytearray(min(CHUNK, last - at))
                source.seek(tensor.start + at)
                if source.readinto(chunk) < len(chunk):
                    raise CheckpointError("a file of weights changed while it was read", where=str(tensor.file))
                if kind == tensor.dtype:
                    target.seek(start + at)
                    target.write(chunk)
                else:
                    values = torch.frombuffer(chunk, dtype=DTYPES[tensor.dtype]).to(DTYPES[kind])
                    target.seek(start + at // tensor.itemsize * values.itemsize)
                    target.write(values.view(torch.uint8).numpy().data)


def _extents(file: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a range of a file that are data rather than holes, where the system tells them apart."""
    if not hasattr(os, "SEEK_DATA"):
        yield begin, end
        return
    while begin < end:
        try:
            begin = os.lseek(file, begin, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # the filesystem cannot tell, else there is no data behind
                yield begin, end
            return
        if begin < end:
            hole = min(os.lseek(file, begin, os.SEEK_HOLE), end)
            yield begin, hole
            begin = hole

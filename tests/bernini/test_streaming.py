"""Safetensors from safetensors, a few bytes at a time: values, dtypes, holes, alignment and what the library reads."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bernini.checkpoints import streaming
from bernini.checkpoints.stored import DTYPES, read_folder, read_header
from bernini.errors import CheckpointError

SHAPES = st.lists(st.integers(0, 40), max_size=3)
TENSORS = st.lists(st.tuples(SHAPES, st.sampled_from([*DTYPES.values(), torch.int64, torch.int8])), max_size=6)


@given(
    tensors=TENSORS, dtype=st.sampled_from([None, torch.float32, torch.bfloat16]), chunk=st.sampled_from([8, 64, 4096])
)
@settings(max_examples=60)
def test_values_are_those_that_torch_would_give(
    tensors: list[tuple[list[int], torch.dtype]], dtype: torch.dtype | None, chunk: int, tmp_path_factory
) -> None:
    folder, draw = tmp_path_factory.mktemp("any"), torch.Generator().manual_seed(len(tensors))
    given = {f"t{i}": (9 * torch.randn(shape, generator=draw)).to(kind) for i, (shape, kind) in enumerate(tensors)}
    save_file(given, folder / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "CHUNK", chunk)
        streaming.write(folder / "out.safetensors", read_folder(folder), dtype)
    written = load_file(folder / "out.safetensors")
    assert written.keys() == given.keys()
    for name, tensor in given.items():
        expected = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        assert written[name].dtype is expected.dtype and torch.equal(written[name], expected)
    with safe_open(folder / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert all(t.start % t.itemsize == 0 for t in read_header(folder / "out.safetensors").values())


@pytest.mark.skipif(not hasattr(os, "SEEK_DATA"), reason="this system does not tell where files have holes")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_holes_stay_holes_and_what_lies_between_them_is_kept(tmp_path: Path, dtype: torch.dtype | None) -> None:
    tensor = torch.zeros(3, 2**22)
    save_file({"a": torch.ones(3), "large": tensor}, tmp_path / "full.safetensors")
    start = read_header(tmp_path / "full.safetensors")["large"].start
    values = torch.randn(4, 3000)
    with (tmp_path / "full.safetensors").open("rb") as file, (tmp_path / "model.safetensors").open("wb") as sparse:
        sparse.write(file.read(start))
        for i, row in enumerate(values):
            at = i * 3_000_007 if i < 3 else tensor.numel() - len(row)  # neither at blocks nor at chunks
            tensor.view(-1)[at : at + len(row)] = row
            sparse.seek(start + 4 * at)
            sparse.write(row.numpy().tobytes())
    streaming.write(tmp_path / "out.safetensors", read_folder(tmp_path), dtype)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["large"], tensor.to(dtype or torch.float32))
    held = [512 * (tmp_path / name).stat().st_blocks for name in ("model.safetensors", "out.safetensors")]
    if held[0] < 2**20:  # the disk has sparse files
        assert held[1] < 2**20


def test_shards_and_index_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {f"layer.{i}.weight": torch.randn(10, 10) for i in range(5)}
    save_file(given, tmp_path / "model.safetensors")
    monkeypatch.setattr(streaming, "SHARD", 900)
    streaming.write_sharded(tmp_path / "out", "model", read_folder(tmp_path), None)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*files, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000 and {*index["weight_map"].values()} == {*files}
    for name, stored in read_folder(tmp_path / "out").items():
        assert torch.equal(load_file(stored.file)[name], given[name])


def test_averages_come_before_weights(tmp_path: Path) -> None:
    save_file(
        {"a": torch.ones(1), "ema.a": torch.zeros(2), "ema.b": torch.zeros(3), "c": torch.ones(4)},
        tmp_path / "model.safetensors",
    )
    found = read_folder(tmp_path)
    assert {name: (t.name, t.shape) for name, t in found.items()} == {
        "a": ("ema.a", (2,)),
        "b": ("ema.b", (3,)),
        "c": ("c", (4,)),
    }
    assert read_folder(tmp_path, ("b", "c")).keys() == {"b", "c"}
    assert read_folder(tmp_path / "nowhere") == {}


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    found = read_folder(tmp_path)
    tensor = found["a"]
    os.truncate(tensor.file, tensor.start + 3998)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        streaming.write(tmp_path / "out.safetensors", found, None)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


DAMAGE = {
    "nothing in it": lambda data: b"",
    "cut in the header": lambda data: data[:20],
    "cut by a byte": lambda data: data[:-1],
    "a byte too long": lambda data: data + b"x",
    "a header that is no JSON": lambda data: data[:8] + b"}" + data[9:],
    "a header beyond the file": lambda data: (2**62).to_bytes(8, "little") + data[8:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_named(damage, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(10)}, file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match="cut short or damaged") as caught:
        read_folder(tmp_path)
    assert caught.value.where == str(file)


@pytest.mark.parametrize(
    ("index", "what", "culprit"),
    [
        ('{"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}', "is not there", "gone.safetensors"),
        ('{"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}', "do not agree", "b is in the index"),
        ('{"weight_map": {"b": "model.safetensors"}}', "do not agree", "2 tensors"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "cannot be read", "have to lie beside it"),
        ('{"weight_map": {"a": "other.safetensors"}}', "there twice", "model.safetensors is not among"),
        ('{"weight_map": 3}', "cannot be read", "index.json"),
        ("{", "cannot be read", "index.json"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(index: str, what: str, culprit: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(10)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=what) as caught:
        read_folder(tmp_path)
    assert culprit in str(caught.value) and caught.value.fix

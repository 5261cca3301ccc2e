"""Which kernel rotates, and what the fused one is given and refuses; that it computes the right thing takes a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bernini.errors import ConfigError, DataError
from bernini.renderer.packing import PackedSample, Segment, pack
from bernini.rope.build import NVCC_FLAGS, SOURCE
from bernini.rope.op import Segments, choose_kernel, fused_frequencies, prepare_segments, sa3d_qk_norm_rope
from bernini.rope.reference import THETA, axis_dims

CPU = torch.device("cpu")
TABLE = torch.tensor([(0, 2, 3, 4, 1.0), (24, 1, 4, 2, 2.5), (32, 3, 3, 4, 0.0)])
TOKENS = 68


def test_a_slice_of_the_sequence_is_rotated_as_the_whole_is():
    x = torch.randn(TOKENS, 2, 16, dtype=torch.float64)
    weight = torch.randn(32, dtype=torch.float64)
    whole = sa3d_qk_norm_rope(x, x, weight, weight, prepare_segments(TABLE, TOKENS, 16), 1e-6)[0]
    parts = []
    for start in range(0, TOKENS, 17):
        segments = prepare_segments(TABLE, 17, 16, offset=start)
        part = x[start : start + 17]
        parts.append(sa3d_qk_norm_rope(part, part, weight, weight, segments, 1e-6)[0])
    assert torch.equal(torch.cat(parts), whole)


def test_without_weights_rows_are_rotated_alone():
    x = torch.randn(TOKENS, 2, 16)
    segments = prepare_segments(TABLE, TOKENS, 16)
    q, k = sa3d_qk_norm_rope(x, 2 * x, None, None, segments, 1e-6)
    torch.testing.assert_close(q.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(k, 2 * q)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_two_floats_make_up_a_frequency(head_dim):
    axis_high, axis_low, id_high, id_low = fused_frequencies(head_dim, CPU).double().unbind(1)
    exact = torch.cat([THETA ** (-torch.arange(0, dim, 2).double() / dim) for dim in axis_dims(head_dim)]) / torch.pi
    assert ((axis_high + axis_low - exact).abs() / exact).max() < 2e-14
    exact = THETA ** (-torch.arange(0, head_dim, 2).double() / head_dim) / torch.pi
    assert ((id_high + id_low - exact).abs() / exact).max() < 2e-14


def test_the_cpu_rotates_by_the_reference(monkeypatch):
    monkeypatch.delenv("BERNINI_ROPE", raising=False)
    assert choose_kernel(CPU, 128) == "reference"
    monkeypatch.setenv("BERNINI_ROPE", "compiled")
    assert choose_kernel(CPU, 128) == "compiled"
    monkeypatch.setenv("BERNINI_ROPE", "fused")
    with pytest.raises(ConfigError, match=r"(?s)cannot run here.*CUDA, not on cpu"):
        choose_kernel(CPU, 128)
    monkeypatch.setenv("BERNINI_ROPE", "fast")
    with pytest.raises(ConfigError, match=r"(?s)unknown kernel 'fast'.*BERNINI_ROPE"):
        choose_kernel(CPU, 128)


def fused() -> Segments:
    return Segments(TABLE, TOKENS, 0, "fused", (fused_frequencies(64, CPU),))


def tensor(shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


ROWS, WEIGHT = tensor((TOKENS, 2, 64)), tensor(128)


@pytest.mark.parametrize(
    ("kernel", "wrong", "kind", "told"),
    [
        (None, {"k": tensor((TOKENS, 3, 64))}, DataError, r"keys of torch.float32 \[68, 3, 64\].*\[68, 2, 64\]"),
        (None, {"k": ROWS.double()}, DataError, "keys of torch.float64"),
        (None, {"q": ROWS.to("meta"), "k": ROWS.to("meta")}, DataError, "on meta do not fit.*on cpu"),
        (None, {"q": ROWS[1:], "k": ROWS[1:]}, DataError, r"queries of .*\[67, 2, 64\].*\[68, 2, 64\]"),
        (None, {"q": ROWS.flatten(1)}, DataError, r"queries of .*\[68, 128\]"),
        (None, {"q": tensor((TOKENS, 4, 32))}, DataError, r"\[68, 4, 64\]"),
        (None, {"weight_q": WEIGHT[1:]}, DataError, "weights of .127..*128 wide"),
        (None, {"weight_k": WEIGHT.to("meta")}, DataError, "on meta"),
        (None, {"weight_q": None}, DataError, "both or neither"),
        (
            "fused",
            {"q": ROWS.double(), "k": ROWS.double()},
            ConfigError,
            "not know torch.float64.*BERNINI_ROPE=compiled",
        ),
        ("fused", {"weight_q": WEIGHT.half()}, DataError, "weights of torch.float16.*that or float32"),
        (
            "fused",
            {"q": tensor((TOKENS, 130, 64)), "k": tensor((TOKENS, 130, 64)), "weight_q": tensor(8320)}
            | {"weight_k": tensor(8320)},
            ConfigError,
            "rows of 8320.*8192 wide at most",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(kernel, wrong, kind, told):
    given = {"q": ROWS, "k": ROWS, "weight_q": WEIGHT, "weight_k": WEIGHT} | wrong
    reference = prepare_segments(TABLE, TOKENS, 64, kernel="reference")
    for segments in [fused()] if kernel else [fused(), reference]:
        with pytest.raises(kind, match=f"(?s){told}"):
            sa3d_qk_norm_rope(**given, segments=segments, eps=1e-6)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([(0, 2, 3, 4, 1)], "tokens 0 to 68 are to be rotated, and the rows hold 24"),
        ([(0, 2, 3, 4, 1), (25, 1, 4, 11, 0)], "row 1: token_start 25.*from token 24 on"),
        ([(4, 2, 32, 1, 0)], "row 0: token_start 4"),
        ([(0, 17, 0, 4, 0)], "H 0.*whole grids"),
        ([(0, 17, 2.5, 4, 0)], "H 2.5.*whole grids"),
        ([(0, 17, 1, 4, -1)], "below 0 or not finite.*source id -1"),
        ([(0, 17, 1, 4, float("nan"))], "source id nan"),
        ([(0, 17, 1, 4)], r"table of shape \[1, 4\]"),
    ],
)
def test_segment_tables_that_are_wrong_are_refused(rows, told):
    for kernel in ("fused", "reference"):
        with pytest.raises(DataError, match=f"(?s){told}"):
            prepare_segments(torch.tensor(rows), TOKENS, 64, kernel=kernel)


def test_slices_outside_the_segments_are_refused():
    prepare_segments(TABLE, 28, 64, offset=40)
    for offset in (41, -1):
        with pytest.raises(DataError, match="do not cover the tokens"):
            prepare_segments(TABLE, 28, 64, offset=offset)


@pytest.mark.parametrize("source_id", [-1.0, float("nan")])
def test_a_pack_takes_no_negative_id(source_id):
    with pytest.raises(DataError, match="has source id"):
        pack([PackedSample([Segment(torch.ones(4, 1, 2, 2), source_id)], torch.ones(1, 8), 0.0)], (1, 2, 2))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_kernels_compile_for_all_supported_gpus(tmp_path: Path):
    include = Path(torch.__file__).parent / "include"
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90, 100)]
    object_file = tmp_path / "sa3d.o"
    command = ["nvcc", "-c", *NVCC_FLAGS, "-Werror=all-warnings", "--threads=2", "-I", str(include), *targets]
    done = subprocess.run([*command, str(SOURCE), "-o", str(object_file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert object_file.stat().st_size > 0

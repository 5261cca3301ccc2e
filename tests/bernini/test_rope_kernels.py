"""Which kernel rotates, and what the fused one is given and refuses; that it computes the right thing takes a GPU."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bernini.errors import BerniniError, ConfigError, DataError
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


def fused(**wrong) -> Segments:
    segments = Segments(TABLE, 0, "fused", (fused_frequencies(64, CPU),))
    return replace(segments, **wrong)


@pytest.mark.parametrize(
    ("q", "k", "weight_q", "weight_k", "told"),
    [
        ((8, 2, 64), (8, 3, 64), 128, 128, "do not fit each other"),
        ((8, 2, 64), (8, 2, 64), 127, 128, "rows are 128 wide"),
        ((8, 2, 64), (8, 2, 64), None, 128, "both or neither"),
        ((8, 130, 64), (8, 130, 64), 8320, 8320, "8192 wide at most"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(q, k, weight_q, weight_k, told):
    weights = [None if width is None else torch.ones(width) for width in (weight_q, weight_k)]
    with pytest.raises(BerniniError, match=told):
        sa3d_qk_norm_rope(torch.ones(q), torch.ones(k), *weights, fused(), 1e-6)


@pytest.mark.parametrize(
    ("q", "weight", "kind", "told"),
    [
        (torch.float64, torch.float32, ConfigError, r"(?s)does not know torch.float64.*BERNINI_ROPE=compiled"),
        (torch.bfloat16, torch.float16, DataError, "weights of that type or float32"),
    ],
)
def test_dtypes_that_the_fused_op_does_not_know_are_refused(q, weight, kind, told):
    x, own = torch.ones(8, 2, 64, dtype=q), torch.ones(128, dtype=weight)
    with pytest.raises(kind, match=told):
        sa3d_qk_norm_rope(x, x, own, own, fused(), 1e-6)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_kernels_compile_for_all_supported_gpus(tmp_path: Path):
    include = Path(torch.__file__).parent / "include"
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90, 100)]
    object_file = tmp_path / "sa3d.o"
    command = ["nvcc", "-c", *NVCC_FLAGS, "-Werror=all-warnings", "--threads=2", "-I", str(include), *targets]
    done = subprocess.run([*command, str(SOURCE), "-o", str(object_file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert object_file.stat().st_size > 0

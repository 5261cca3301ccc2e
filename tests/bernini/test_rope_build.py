"""What becomes of a build that fails: one warning with the reason, and another kernel."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._triton import has_triton

from bernini.rope import build
from bernini.rope.build import load_library
from bernini.rope.op import choose_kernel

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("BERNINI_ROPE", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    load_library.cache_clear()
    yield
    load_library.cache_clear()


def toolkit(folder: Path, script: str) -> str:
    """A CUDA toolkit whose compiler is a shell script."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return str(folder)


def warning_of_two_calls() -> str:
    """The one warning, and another kernel is chosen."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kernels = {choose_kernel(torch.device("cuda"), 128) for _ in range(2)}
    assert kernels == {"compiled" if has_triton() else "reference"}
    (warning,) = (str(w.message) for w in told if "SA-3D" in str(w.message))
    return warning


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "there is no CUDA toolkit"),
        ("echo 'sa3d.cu(7): error: no such thing' >&2; exit 1", "sa3d.cu(7): error: no such thing"),
        (
            "echo 'nvcc fatal   : Unsupported gpu architecture' >&2; exit 1",
            "nvcc fatal   : Unsupported gpu architecture",
        ),
    ],
)
def test_a_broken_build_is_told_once_and_does_without(
    script: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where nothing was built when the package was installed.
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    home = toolkit(tmp_path / "cuda", script) if script else None
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", home)
    assert warning_of_two_calls().startswith(f"the fused SA-3D RoPE op is not used: {reason}. ")


def test_a_library_that_cannot_be_loaded_is_told_with_the_linkers_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    (tmp_path / "_sa3d.abi3.so").write_bytes(b"not a library")
    assert re.search(r"is not used: .*/_sa3d\.abi3\.so: (file too short|invalid ELF)", warning_of_two_calls())


@pytest.mark.skipif(torch.version.cuda is not None, reason="this is what a torch without CUDA says")
def test_a_build_at_install_says_what_it_takes() -> None:
    environment = {**os.environ, "BERNINI_BUILD_CUDA": "1"}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode and "takes nvcc, and a torch that was built with CUDA" in done.stderr

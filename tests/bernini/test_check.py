"""`bernini check` as it is called."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from bernini.check import main

NAMES = ["bernini", "python", "torch", "cuda", "lightning", "transformers", "diffusers", "cpu", "rope", "attention"]
NAMES += ["nvcc", "video"]


def facts(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    capsys.readouterr()
    assert main(["--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_prints_a_line_for_each_fact() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-m", "bernini", "check"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert [name for name in lines if not name.startswith("cuda:")] == NAMES
    assert len(lines) == len(NAMES) + torch.cuda.device_count()
    assert lines["python"] == platform.python_version() and lines["torch"] == torch.__version__
    assert lines["diffusers"] == version("diffusers") and lines["video"] == f"PyAV {version('av')}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what a machine without a GPU says")
def test_without_a_gpu_it_says_why_nothing_is_faster(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BERNINI_ROPE", raising=False)
    found = facts(capsys)
    assert found["rope"] == "reference; not fused: it runs on CUDA, not on cpu"
    assert found["attention"] == "native" and list(found) == NAMES


@pytest.mark.parametrize(
    ("asked", "told"), [("compiled", "compiled, as BERNINI_ROPE has it"), ("fast", "none: unknown kernel 'fast'")]
)
def test_what_the_environment_asks_for_is_told(
    asked: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BERNINI_ROPE", asked)
    assert facts(capsys)["rope"] == told


@pytest.mark.parametrize(
    ("script", "told"),
    [(None, "not found"), ("exit 1", "{}, which does not run"), ("echo Build, release 12.9, V1", "{}, CUDA 12.9")],
)
def test_the_compiler_is_named_if_there_is_one(
    script: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "nvcc"
    if script:
        nvcc.write_text(f"#!/bin/sh\n{script}\n")
        nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    assert facts(capsys)["nvcc"] == told.format(nvcc)

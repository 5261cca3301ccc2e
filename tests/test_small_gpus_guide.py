"""The commands of docs/small-gpus.md as they are written there, with tiny models in the places of large ones."""

import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_lora_guide import TINY, make_clips, make_models

from bernini.cli import main

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "small-gpus.md").read_text()
SHORT = {
    "prepare": ["--max-edge", "32"],
    "fit": [*TINY, "--data.max_samples=1", "--trainer.accumulate_grad_batches=1", "--data.val=null"],
    "small": shlex.split(
        "--device cpu --model tiny --text-rows 8 --steps 1 --warmup 1 --rank 2 --variants int8 int8-swap"
    ),
}


def test_guide(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUN", raising=False)
    Path("configs").symlink_to(ROOT / "configs")
    make_models(wan)
    make_clips()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line) for kind, block in blocks if not kind for line in block.splitlines()]
    for program, *words in commands:
        if "--model.float8" in words and find_spec("torchao") is None:
            continue
        if words[0] == "check":
            assert main(words) == 0 and "on a device of 24 GiB" in capsys.readouterr().out
        elif program == "bernini":
            swaps = any("swap" in word or "small" in word for word in words)
            assert main([*words, *SHORT[words[0]], *(["--model.swap_blocks=2"] if swaps else [])]) == 0
        else:
            assert [program, *words[:2]] == ["python", "-m", "benchmarks.speed.small"]
            monkeypatch.setattr(sys, "argv", ["small", *words[2:], *SHORT["small"]])
            runpy.run_module("benchmarks.speed.small", run_name="__main__")
            assert "int8-swap" in capsys.readouterr().out
    assert [words[0] for _, *words in commands].count("fit") >= 5

"""The commands and the code of docs/rope.md as they are written there, small and on a CPU."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from bernini.cli import main
from bernini.rope.op import FUSED_HEADS, FUSED_WIDTH, Kernel, prepare_segments, sa3d_qk_norm_rope

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "rope.md").read_text()
SMALL = "--device cpu --warmup 1 --backend aot_eager"
ROUNDS = f"{SMALL} --shapes tiny --rounds 1 --repeats 1"
SHORT = {
    "benchmarks.speed.rope": ROUNDS,
    "benchmarks.speed.pointwise": ROUNDS,
    "benchmarks.speed.renderer": f"{SMALL} --model tiny --grid 2 4 4 --text-rows 8 --steps 1 --forwards 1",
}


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def test_the_code_rotates_slices_as_the_whole() -> None:
    names: dict = {}
    for block in blocks("python"):
        exec(block, names)
    segments = names["segments"]
    x, weight = torch.randn(480, 12, 128), torch.rand(12 * 128)
    whole, _ = sa3d_qk_norm_rope(x, x, weight, weight, segments, 1e-6)
    half, _ = sa3d_qk_norm_rope(x[240:], x[240:], weight, weight, names["second_half"], 1e-6)
    assert torch.equal(half, whole[240:])
    assert names["q"].shape == names["k"].shape == (480, 12, 128)
    target = prepare_segments(torch.tensor([(0, 5, 6, 8, 0.0)]), 240, 128)
    alone, _ = sa3d_qk_norm_rope(x[240:], x[240:], weight, weight, target, 1e-6)
    torch.testing.assert_close(half, alone)  # the target is rotated as if there were no source


def test_the_commands_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("BERNINI_ROPE", raising=False)
    ran = []
    for command in "".join(blocks("")).splitlines():
        program, *words = shlex.split(command)
        if program.startswith("BERNINI_BUILD_CUDA="):
            continue  # tests/gpu builds it
        if program == "bernini":
            assert main(words) == 0
            assert re.search(r"^rope +(fused|compiled|reference)", capsys.readouterr().out, re.M)
        else:
            assert (program, words[0]) == ("python", "-m")
            module, *options = words[1:]
            monkeypatch.setattr(sys, "argv", [module, *options, *shlex.split(SHORT[module])])
            runpy.run_module(module, run_name="__main__")
        ran.append(words[0] if program == "bernini" else words[1])
    assert ran == ["check", *SHORT]


def test_the_table_names_the_kernels_and_their_limits() -> None:
    assert re.findall(r"^\| `([a-z]+)` \|", GUIDE, re.M) == list(get_args(Kernel))
    *heads, last = FUSED_HEADS
    assert f"heads of {', '.join(map(str, heads))} or {last} dimensions, rows of at most {FUSED_WIDTH}" in GUIDE

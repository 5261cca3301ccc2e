"""The commands and the figures of docs/performance.md, small and on a CPU where they run."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import get_args

import pytest

from bernini.cli import main
from bernini.renderer.recompute import Recompute

GUIDE = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
COMMANDS = "".join(re.findall(r"^```\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)).splitlines()
SMALL = "--device cpu --backend aot_eager --model tiny --layers 1 --grid 2 4 4 --text-rows 8"
SMALL += " --steps 1 --forwards 1 --warmup 1"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = shlex.split(command)
    if program == "bernini":
        assert main(words) == 0
        told = re.sub(" +", " ", capsys.readouterr().out)
        if "1.3b" in words:  # the table
            for way, gib in re.findall(r"^\| `(\w+)` \| ([0-9.]+) GiB", GUIDE, re.MULTILINE):
                assert f"recompute: {way} {gib} GiB in all" in told
        return
    assert (program, *words[:2]) == ("python", "-m", "benchmarks.speed.renderer")
    monkeypatch.setattr(sys, "argv", [words[1], *words[2:], *shlex.split(SMALL)])
    runpy.run_module(words[1], run_name="__main__")
    out = capsys.readouterr().out
    for variant in words[words.index("--also") + 1 :]:
        assert re.search(rf"^ours compiled, {variant} +\d", out, re.MULTILINE)


def test_every_way_to_recompute_is_told() -> None:
    assert re.findall(r"^\| `(\w+)` \|.*\|.*\| .* \|$", GUIDE, re.MULTILINE)[1:] == list(get_args(Recompute))

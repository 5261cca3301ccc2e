"""The configuration and the command of docs/throughput.md as they are written there."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from callbacks import Throughput

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```\n(.*?)^```$", (ROOT / "docs" / "throughput.md").read_text(), re.DOTALL | re.MULTILINE)
SHORT = {
    "benchmarks.speed.packs": "--device cpu --model tiny --max-frames 17 --max-area 4096 --tokens 200 --samples 200 "
    "--ranks 2 --steps 1 --warmup 1 --no-compile",
}


def test_the_callback_is_named_as_configurations_name_it() -> None:
    (block,) = (block for block in BLOCKS if block.startswith("trainer:"))
    ((callback,),) = [yaml.safe_load(block)["trainer"]["callbacks"]]
    package, name = callback["class_path"].rsplit(".", 1)
    assert getattr(sys.modules[package], name) is Throughput


def test_the_commands_run(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [line for block in BLOCKS for line in block.splitlines() if line.startswith("python -m ")]
    assert {command.split()[2] for command in commands} == SHORT.keys()
    for command in commands:
        module = command.split()[2]
        monkeypatch.setattr(sys, "argv", [module, *SHORT[module].split()])
        monkeypatch.delitem(sys.modules, module, raising=False)
        runpy.run_module(module, run_name="__main__")

"""The scaling benchmark on two ranks of a CPU: what it compares and what it writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed.scaling import main
from bernini.errors import ConfigError

ROOT = Path(__file__).parents[2]
WRITTEN = "torchrun --nproc-per-node 2 -m benchmarks.speed.scaling"
TINY = "--device cpu --check-steps 3 --json found.json"


def run_ranks(folder: Path, more: str) -> tuple[dict[str, Any], str]:
    """Figures by way, and what was printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", *WRITTEN.split()[3:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *TINY.split(), *more.split()]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())["ways"], done.stdout


def test_two_ranks_are_compared_with_one(tmp_path: Path) -> None:
    assert WRITTEN in (ROOT / "docs" / "scale.md").read_text().splitlines()
    ways, shown = run_ranks(tmp_path, "--model tiny --grid 2 4 4 --long-grid 4 4 4 --check-grid 1 3 5 --text-rows 4")
    assert {way: row["tokens"] for way, row in ways.items()} == {"ddp": 64, "fsdp2": 64, "ulysses": 64}
    for way, row in ways.items():
        work = 1 if way == "ulysses" else 2
        assert row["scaling"] == pytest.approx(row["alone_s"] * work / 2 / row["together_s"])
        assert row["tokens_per_s"] == pytest.approx(64 / row["together_s"])
        assert len(row["losses"]) == 3 and row["losses"][2] != row["losses"][0]
        assert row["difference"] < (1e-3 if way == "ddp" else 1e-5)  # which computes in bf16
    assert "ulysses" in shown and "scaling" in shown


def test_planners_are_compared_too(tmp_path: Path) -> None:
    ways, _ = run_ranks(tmp_path, "--model planner-tiny --samples 1 --ways fsdp2 ulysses")
    assert {way: row["tokens"] for way, row in ways.items()} == {"fsdp2": 2000, "ulysses": 1000}
    assert all(row["difference"] < 1e-5 for row in ways.values())


def test_without_ranks_it_says_how_to_start_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        main([])

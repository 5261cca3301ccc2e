"""The scaling benchmark on two ranks of a CPU: what it compares and what it writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.speed.scaling import main
from bernini.errors import ConfigError

ROOT = Path(__file__).parents[2]
TINY = "--device cpu --model tiny --grid 2 4 4 --long-grid 4 4 4 --check-grid 1 3 5 --text-rows 4 --check-steps 3"


def test_two_ranks_are_compared_with_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    written = "torchrun --nproc-per-node 2 -m benchmarks.speed.scaling"
    assert written in (ROOT / "docs" / "scale.md").read_text().splitlines()
    command = [sys.executable, *launcher, *written.split()[3:], *TINY.split(), "--json", "found.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ways = json.loads((tmp_path / "found.json").read_text())["ways"]
    assert {way: row["tokens"] for way, row in ways.items()} == {"ddp": 64, "fsdp2": 64, "ulysses": 64}
    for way, row in ways.items():
        work = 1 if way == "ulysses" else 2
        assert row["scaling"] == pytest.approx(row["alone_s"] * work / 2 / row["together_s"])
        assert row["tokens_per_s"] == pytest.approx(64 / row["together_s"])
        assert len(row["losses"]) == 3 and row["losses"][2] != row["losses"][0]
        assert row["difference"] < (1e-3 if way == "ddp" else 1e-5)  # which computes in bf16
    assert "ulysses" in done.stdout and "scaling" in done.stdout


def test_without_ranks_it_says_how_to_start_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        main([])

"""Training on two GPUs: under DDP, FSDP2 and Ulysses the losses are those of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

ROOT = Path(__file__).parents[2]
SMALL = "--layers 4 --grid 5 30 52 --long-grid 11 30 53 --check-grid 3 15 26"


def test_losses_are_those_of_one_gpu_for_twenty_steps(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command = [sys.executable, *launcher, "-m", "benchmarks.speed.scaling", *SMALL.split(), "--json", "found.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stderr  # the command compares the losses itself
    ways = json.loads((tmp_path / "found.json").read_text())["ways"]
    for row in ways.values():
        assert len(row["losses"]) == 20 and sum(row["losses"][-5:]) < sum(row["losses"][:5])

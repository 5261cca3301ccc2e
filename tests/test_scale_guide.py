"""The commands of docs/scale.md as they are written there, with something tiny in the places of models and data."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_configs import ROOT, tiny

from bernini.lightning_cli import run_lightning

GUIDE = (ROOT / "docs" / "scale.md").read_text()
LINES = [line for block in re.findall(r"```\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()]
FITS = [line for line in LINES if "bernini fit" in line]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the configurations alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUN", raising=False)
    Path("configs").symlink_to(ROOT / "configs")
    return tmp_path


def arguments(line: str, wan: Path, shards: Path) -> list[str]:
    """What follows ``bernini fit``, and after that what makes it tiny."""
    words = shlex.split(line.partition("bernini fit ")[2].replace("--ckpt_path auto", ""))
    return [*words, *tiny(ROOT / words[1], wan, shards)]


@pytest.mark.parametrize("line", FITS)
def test_a_command_asks_for_the_gpus_that_its_launcher_starts(line: str, wan: Path, shards: Path, here: Path) -> None:
    trainer = run_lightning(arguments(line, wan, shards), run=False).trainer
    asked = {8: 1, 2: 1, 1: 1} if line.startswith("bernini") else {8: 2}
    if "torchrun" in line:
        assert "--nnodes 2 --nproc-per-node 8" in line
    if "srun" in line:
        assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=8", "#SBATCH --gpus-per-node=8"} <= {*LINES}
    assert asked[trainer.num_devices] == trainer.num_nodes


def test_torchrun_starts_it(wan: Path, shards: Path, here: Path) -> None:
    (line,) = [line for line in FITS if line.startswith("torchrun") and "hsdp" in line]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = shlex.split(line.partition(" -m bernini fit ")[0].replace("--nnodes 2", "--nnodes 1"))[1:]
    launcher = ["2" if word == "8" else word.replace("HOST:29500", host) for word in launcher]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "bernini", "fit"]
    smaller = ["--trainer.num_nodes=1", "--trainer.devices=2", "--data.val=null"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments(line, wan, shards), *smaller],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (last,) = here.glob("runs/*/checkpoints/last.ckpt")
    assert {path.name for path in last.iterdir()} >= {"meta.pt", "__0_0.distcp", "__1_0.distcp"}

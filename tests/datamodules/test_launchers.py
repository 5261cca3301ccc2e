"""Ranks and workers, however they come to be, share the samples among them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from recording import keys_in, make_shards, read_rows

ROOT = Path(__file__).parents[2]
START_METHODS = ["fork", "spawn", "forkserver"]
MEETING = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK")
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_every_sample_comes_once_with_any_launcher_and_start_method(
    tmp_path: Path, launcher: str, pytestconfig: pytest.Config
) -> None:
    start_methods = START_METHODS if (every := pytestconfig.getoption("start_methods")) else ["spawn"]
    if launcher == "torchrun" and not every:
        pytest.skip("with --start-methods; `factories.run_ranks` starts ranks alike in other tests")
    shards = make_shards(tmp_path / "shards", 40)
    # A trainer of another test in this process may have left where its ranks met.
    environment = {name: value for name, value in os.environ.items() if name not in MEETING}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [*TORCHRUN, f"--master-port={port}"] if launcher == "torchrun" else []
    command = [sys.executable, *torchrun, str(ROOT / "tests" / "launched.py")]
    done = subprocess.run(
        [*command, shards, str(tmp_path), *start_methods], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    orders = []
    for start_method in start_methods:
        ranks = [keys_in(read_rows(tmp_path / start_method, rank)) for rank in range(2)]
        assert [len(rank) for rank in ranks] == [5, 5]
        orders.append([first + second for first, second in zip(*ranks, strict=True)])
        assert sorted(key for keys in orders[-1] for key in keys) == [f"s{number:03d}" for number in range(40)]
    assert all(order == orders[0] for order in orders)

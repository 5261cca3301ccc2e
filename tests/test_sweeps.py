"""Every sweep, run for a step with the command line that W&B's agent makes of it."""

import os
import queue
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
import yaml
from wandb import wandb_agent
from wandb_files import fresh_wandb, stored_runs

from bernini.cli import main
from bernini.lightning_cli import LINKS, BerniniCLI, run_lightning
from bernini.renderer.experts import Architecture, Experts

ROOT = Path(__file__).parents[1]
SWEEPS: dict[str, dict[str, Any]] = {
    file.stem: yaml.safe_load(file.read_text()) for file in sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
}
SMALL = [
    *("--trainer.max_steps=1", "--model.lr_scheduler.init_args.total_steps=3", "--trainer.log_every_n_steps=1"),
    *("--trainer.val_check_interval=1", "--trainer.limit_val_batches=1", "--model.sampling.steps=2"),
    *("--data.batch_size=2", "--data.workers=0", "--data.val_length=2", "--data.height=32", "--data.width=32"),
]
RUN_ID = "a1b2c3d4"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with configurations, assets and a model; no step goes to a server."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    scored = tmp_path / "configs" / "toy" / "scored.yaml"
    scored.write_text(scored.read_text().replace("limit: 32", "limit: 1"))
    monkeypatch.chdir(tmp_path)
    fresh_wandb(monkeypatch, tmp_path)
    for name, value in {"DIR": str(tmp_path), "SWEEP_ID": "sweep", "RUN_ID": "", "SWEEP_PARAM_PATH": ""}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)  # the agent sets the last two for each run
    yield tmp_path
    wandb.teardown()


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Two random experts of the toy renderer's shape."""
    toy = yaml.safe_load((ROOT / "configs/toy/renderer.yaml").read_text())["model"]["init_args"]["architecture"]
    shape = Architecture(**toy)
    Experts(shape.build(), shape.build()).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def pick(sweep: dict[str, Any]) -> dict[str, Any]:
    """Values that an agent could be given: the last of a list, or near the end of a range."""
    return {
        name: space["values"][-1] if "values" in space else 0.9 * space["max"]
        for name, space in sweep["parameters"].items()
    }


def start(sweep: dict[str, Any], values: dict[str, Any]) -> Any:
    """Have W&B's agent start a run, as it does when the server has chosen the values."""
    agent = wandb_agent.Agent(None, queue.Queue())
    agent._sweep_command = list(sweep["command"])
    arguments = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"run_id": RUN_ID, "args": arguments, "program": sweep["program"]})
    return agent._run_processes[RUN_ID]


def run_here(command: list[str], *more: str) -> BerniniCLI:
    """Run an agent's command in this process, for one step."""
    place = f"runs/sweeps/{RUN_ID}"
    assert command[:2] == ["/usr/bin/env", "-SRUN=runs/sweeps/${WANDB_RUN_ID}"]
    assert command[2:6] == ["python", "-m", "bernini", "fit"]
    os.environ["RUN"] = place  # as env does
    try:
        return run_lightning([*command[5:], *SMALL, *more])
    finally:
        del os.environ["RUN"]


REACHED: dict[str, Callable[[BerniniCLI], dict[str, Any]]] = {
    "renderer_lr": lambda cli: {
        "model.lr_scheduler.init_args.max_lr": cli.trainer.optimizers[0].param_groups[0]["max_lr"]
    },
    "renderer_shift": lambda cli: {"model.noise.shift": cli.model.noise.shift},
    "renderer_dropout": lambda cli: {
        "model.dropout.text": cli.model.dropout.text,
        "model.dropout.video": cli.model.dropout.video,
    },
    "lora_rank": lambda cli: {
        "model.lora.rank": min(p.shape[0] for n, p in cli.model.named_parameters() if "lora_A" in n)
    },
}


@pytest.mark.parametrize("name", SWEEPS)
def test_value_reaches_the_run_and_the_metric_comes_back(
    name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, values = SWEEPS[name], pick(SWEEPS[name])
    monkeypatch.setattr(wandb_agent, "AgentProcess", SimpleNamespace)  # keeps the command instead of running it
    cli = run_here(start(sweep, values).command, *([f"--model.init_from={model}"] if name == "lora_rank" else []))
    assert cli.trainer.global_step == 1
    assert REACHED[name](cli) == values
    wandb.teardown()
    (run,) = stored_runs(tmp_path / "runs" / "sweeps" / RUN_ID)
    assert run.id == RUN_ID and run.exit_code == 0
    assert {name: run.config[name] for name in values} == values  # the sweep's own table
    assert sweep["metric"]["name"] in run.names


def test_agent_runs_the_command_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = SWEEPS["renderer_lr"]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    small = {**sweep, "command": [*sweep["command"], *SMALL]}
    process = start(small, {"model.lr_scheduler.init_args.max_lr": 0.0123})
    assert process.wait() == 0
    place = tmp_path / "runs" / "sweeps" / RUN_ID
    last = torch.load(place / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["optimizer_states"][0]["param_groups"][0]["max_lr"] == 0.0123
    assert [run.id for run in stored_runs(place)] == [RUN_ID]
    # its configuration runs again, as docs/sweeps.md has it
    monkeypatch.setenv("RUN", "runs/best")
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert main(["fit", "-c", f"runs/sweeps/{RUN_ID}/config.yaml"]) == 0
    again = torch.load(tmp_path / "runs" / "best" / "checkpoints" / "last.ckpt", weights_only=True)
    torch.testing.assert_close(again["state_dict"], last["state_dict"], rtol=0, atol=0)


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_is_one_that_wandb_takes(name: str) -> None:
    sweep = SWEEPS[name]
    assert sweep["method"] in ("grid", "random", "bayes") and sweep["metric"]["goal"] in ("minimize", "maximize")
    assert not {target for targets in LINKS.values() for target in targets} & set(sweep["parameters"])
    if sweep["method"] == "grid":
        assert all("values" in space for space in sweep["parameters"].values())
    if "early_terminate" in sweep:  # hyperband counts how often the metric was logged
        assert sweep["metric"]["name"].startswith("val/")
    assert sweep["command"][-1] == "${args}" and sweep["name"] == name

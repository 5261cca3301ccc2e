"""Sharded runs: broken off twice they are the unbroken run to the bit, and their checkpoints serve without a mesh."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cotrainings import EVERY, make_cotraining_config, make_planner_folder
from factories import callback, fit, keep_checkpoints, make_config, run_ranks, write_config
from planners import make_planner_config

STEPS = 4


def renderer(wan: Path, shards: Path, root: Path) -> dict[str, Any]:
    """Both experts."""
    config = make_config(wan, shards, root, expert="both", recompute="full")
    config["trainer"] |= {"max_steps": STEPS, "limit_val_batches": 4}
    config["trainer"]["callbacks"] = [callback("callbacks.EMA", decay=0.9)]
    config["data"]["init_args"] |= {"batch_size": 2, "max_samples": 4}
    return config


def lora(wan: Path, shards: Path, root: Path) -> dict[str, Any]:
    """Of which checkpoints hold what is trained alone, in one file."""
    config = renderer(wan, shards, root)
    config["model"]["init_args"]["lora"] = {"rank": 2, "dropout": 0.1}
    return config


def planner(wan: Path, shards: Path, root: Path) -> dict[str, Any]:
    config = make_planner_config(root, STEPS)
    config["data"]["init_args"] |= {"batch_size": 2, "val_length": 4}
    return config


def cotraining(wan: Path, shards: Path, root: Path) -> dict[str, Any]:
    """Parts come in after three steps: a checkpoint of the second one has optimizer states of the first alone."""
    folder = root.parent / "planner"
    if not folder.exists():
        make_planner_folder(folder)
    stages = [{"train": ["connector_gen", "renderer_high"], "until": 3}, {"train": EVERY}]
    config = make_cotraining_config(wan, folder, root, STEPS, stages=stages, recompute="full")
    config["data"]["init_args"] |= {"batch_size": 2}
    return config


def same(one: Any, other: Any) -> bool:
    """Whether nested states are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def consolidated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sharded checkpoint as one file."""
    if folder.is_file():
        return folder
    monkeypatch.setattr("sys.argv", ["consolidate_checkpoint", str(folder)])
    runpy.run_module("lightning.fabric.utilities.consolidate_checkpoint", run_name="__main__")
    return folder.with_name(f"{folder.name}.consolidated")


@pytest.mark.parametrize(("system", "peers"), [(renderer, 1), (lora, 2), (planner, 1), (cotraining, 2)])
def test_a_sharded_run_that_is_resumed_twice_is_the_unbroken_one(
    system: Callable[..., dict[str, Any]],
    peers: int,
    wan: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(name: str, root: Path, *more: str, verb: str = "fit") -> list[str]:
        config = system(wan, shards, root)
        recorder = callback("factories.Recorder", file=str(tmp_path / name))
        config["trainer"]["callbacks"] = [c for c in config["trainer"]["callbacks"] if "EMA" in c["class_path"]]
        config["trainer"]["callbacks"].append(recorder)
        keep_checkpoints(config, root, every=1)
        sizes = {"tensor_parallel_size": peers, "process_group_backend": "gloo"}
        strategy = callback("bernini.strategy.ShardedStrategy", **sizes)
        config["trainer"] |= {"devices": 2, "strategy": strategy, "gradient_clip_val": 0.1, "logger": False}
        config["trainer"] |= {"val_check_interval": STEPS}
        return [verb, "-c", write_config(tmp_path / f"{name}.yaml", config), *more]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    resumed = [("--ckpt_path=auto", f"--trainer.max_steps={steps}") for steps in (STEPS - 2, STEPS - 1, STEPS)]
    commands = [run("whole", whole), *(run(f"part{n}", broken, *more) for n, more in enumerate(resumed))]
    commands += [run("validated", broken, "--ckpt_path=auto", verb="validate")]
    assert run_ranks(2, *commands) == [0, 0]

    def record(name: str) -> list[dict[str, Any]]:
        return [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]

    unbroken, parts = record("whole"), [record(f"part{n}") for n in range(3)]
    for rank in range(2):
        assert [loss for part in parts for loss in part[rank]["losses"]] == unbroken[rank]["losses"]
        (metrics,) = unbroken[rank]["metrics"]
        assert parts[-1][rank]["metrics"] == record("validated")[rank]["metrics"] == [metrics] and metrics["val/loss"]
    files = [consolidated(root / "last.ckpt", monkeypatch) for root in (whole, broken)]
    one, other = (torch.load(file, weights_only=True) for file in files)
    optimizer = "optimizer_states" if system is lora else "optimizer_0"
    assert one["state_dict"] and one[optimizer] and one["callbacks"]["EMA"]["average"]
    for key in ("state_dict", optimizer):
        assert same(one[key], other[key]), key
    assert same(one["callbacks"]["EMA"], other["callbacks"]["EMA"])

    alone = system(wan, shards, tmp_path / "alone")
    alone["trainer"]["logger"] = False
    found = fit(alone, f"--ckpt_path={files[0]}", verb="validate")[0]["metrics"]
    known = {name: value for name, value in found[0].items() if "plan_" not in name}
    assert known == pytest.approx(metrics, abs=1e-5)

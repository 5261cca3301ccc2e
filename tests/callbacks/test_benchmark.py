"""The benchmark during training: it measures the average, and leaves no trace in the run."""

import copy
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
import wandb
from factories import EDGE, FRAMES, callback, fit, keep_checkpoints, make_config, write_config
from official_files import WRITERS
from torch import Tensor
from wandb_files import stored_runs

from benchmarks.quality.interface import Item
from benchmarks.quality.toy import ToyBenchmark
from bernini.cli import main
from bernini.errors import ConfigError
from callbacks import BenchmarkCallback

TASKS = ["t2i", "v2v", "rv2v"]
SETTINGS = {"tasks": TASKS, "per_task": 4, "frames": FRAMES, "size": EDGE}


def bench(folder: Path, kind: str = "benchmarks.quality.toy.ToyBenchmark", **arguments: Any) -> dict[str, Any]:
    """The callback as a configuration names it: two steps apart, six of twelve items, one at a time."""
    arguments = {"every_n_steps": 2, "limit": 6, "batch_size": 1, **arguments}
    benchmark = {"class_path": kind, "init_args": SETTINGS}
    return callback("callbacks.BenchmarkCallback", benchmark=benchmark, folder=str(folder), **arguments)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


class Random(L.Callback):
    """Draws from every generator after each step, notes the batches, and writes all that down."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.drawn: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        modes = [part.training for part in pl_module.modules()]
        self.drawn.append([[sample.key for sample in batch.samples], batch.cursor, sum(modes), len(modes)])

    def on_train_batch_end(self, *_: Any) -> None:
        self.drawn.append([torch.rand(()).item(), float(np.random.rand()), random.random()])

    def on_train_end(self, *_: Any) -> None:
        self.file.write_text(json.dumps(self.drawn))


@dataclass(frozen=True)
class Broken(ToyBenchmark):
    """Inputs of one task cannot be made, those of another cannot be scored."""

    name: ClassVar[str] = "broken"

    def conversation(self, item: Item) -> Any:
        if item.task == "t2i":
            raise OSError("the disk is gone")
        return super().conversation(item)

    def score(self, item: Item, pixels: Tensor) -> dict[str, float]:
        if item.task == "v2v":
            raise RuntimeError("the judge is ill")
        return super().score(item, pixels)


@pytest.fixture
def config(wan: Path, shards: Path, tmp_path: Path) -> dict[str, Any]:
    """Five steps of two batches each, averaged, with a LoRA's dropout."""
    config = make_config(wan, shards, tmp_path / "run", lora={"rank": 2, "dropout": 0.3})
    config["trainer"] |= {"max_steps": 5, "accumulate_grad_batches": 2}
    config["trainer"]["callbacks"] = [callback("callbacks.EMA", decay=0.5)]
    return config


def trained(
    config: dict[str, Any], folder: Path, *callbacks: dict[str, Any]
) -> tuple[list[float], Any, dict[str, Any]]:
    """Losses, draws and final checkpoint of a run."""
    config = copy.deepcopy(config)
    draws = callback("test_benchmark.Random", file=str(folder / "draws.json"))
    config["trainer"]["callbacks"] += [*callbacks, draws]
    keep_checkpoints(config, folder)
    losses = fit(config)[0]["losses"]
    return losses, json.loads((folder / "draws.json").read_text()), torch.load(folder / "last.ckpt", weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Whether nests are equal to the bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("kind", ["benchmarks.quality.toy.ToyBenchmark", "test_benchmark.Broken"])
def test_a_run_is_to_the_bit_what_it_is_without(config: dict[str, Any], tmp_path: Path, kind: str) -> None:
    losses, draws, state = trained(config, tmp_path / "plain")
    again, drawn, found = trained(config, tmp_path / "scored", bench(tmp_path / "bench", kind))
    assert again == losses and len(losses) == 10
    assert drawn == draws  # batches, modes, and the generators of torch, numpy and Python
    assert same(found["state_dict"], state["state_dict"])
    assert same(found["optimizer_states"], state["optimizer_states"])
    assert same(found["callbacks"]["EMA"], state["callbacks"]["EMA"])
    assert sorted(p.name for p in (tmp_path / "bench").iterdir()) == ["step-000002", "step-000004", "step-000005"]
    assert all((tmp_path / "bench" / f"step-00000{n}" / "table.md").is_file() for n in (2, 4, 5))


def test_an_official_benchmark_is_scored_as_far_as_pixels_go(config: dict[str, Any], tmp_path: Path) -> None:
    WRITERS["ivebench"](tmp_path / "data")
    sizes = {"frames": FRAMES, "max_edge": 64, "min_edge": 32}
    settings = {"root": str(tmp_path / "data"), "accept_licence": True, **sizes}
    kind = {"class_path": "benchmarks.quality.official.ivebench.IVEBench", "init_args": settings}
    config["trainer"]["max_steps"] = 2
    config["trainer"]["callbacks"].append(bench(tmp_path / "bench", limit=2))
    config["trainer"]["callbacks"][-1]["init_args"]["benchmark"] = kind
    fit(config)
    found = summary(tmp_path / "bench" / "step-000002")
    assert [(c["metric"], c["n"]) for c in found["cells"]] == [("TF", 2)] and found["failures"] == []
    assert {row["score"] for row in found["missing"]} >= {"SC", "IS"} and found["comparable"] is False
    assert main(["bench", "report", str(tmp_path / "bench" / "step-000002")]) == 0


def test_figures_of_a_part_are_marked_and_reach_the_loggers(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"]["logger"] = callback("lightning.pytorch.loggers.CSVLogger", save_dir=str(tmp_path))
    config["trainer"]["callbacks"].append(bench(tmp_path / "bench"))
    fit(config)
    found = summary(tmp_path / "bench" / "step-000004")
    assert (found["items"], found["of"], found["coverage"], found["comparable"]) == (6, 12, 1, False)
    assert {(c["task"], c["of"]) for c in found["cells"]} == {(task, 2) for task in TASKS}
    assert found["run"]["model"] == {"step": 4, "weights": "moving average"}
    assert "not comparable with full runs" in (tmp_path / "bench" / "step-000004" / "table.md").read_text()
    assert main(["bench", "report", str(tmp_path / "bench" / "step-000004")]) == 0
    assert (tmp_path / "bench" / "step-000004" / "report.html").read_text().count("<article") == 6
    head, *rows = (
        line.split(",") for line in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    )
    for cell in found["cells"]:
        column = head.index(f"bench/toy/{cell['task']}/{cell['metric']}")
        logged = {int(row[head.index("step")]): float(row[column]) for row in rows if row[column]}
        assert logged.keys() == {2, 4, 5} and logged[4] == pytest.approx(cell["value"])
    (flags,) = {(r[head.index("bench/toy/coverage")], r[head.index("bench/toy/comparable")]) for r in rows} - {("", "")}
    assert tuple(map(float, flags)) == (1, 0)


def test_all_items_make_a_comparable_run(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"] |= {"max_steps": 1}
    config["trainer"]["callbacks"].append(bench(tmp_path / "bench", limit=None, batch_size=4))
    fit(config)
    found = summary(tmp_path / "bench" / "step-000001")
    assert found["comparable"] and found["items"] == found["of"] == 12


def test_the_average_is_what_is_scored_and_a_checkpoint_gives_the_same(
    config: dict[str, Any], wan: Path, tmp_path: Path
) -> None:
    config["trainer"]["callbacks"].append(bench(tmp_path / "bench"))
    keep_checkpoints(config, tmp_path)
    # `validate` reads the same average back from the checkpoint; a run that keeps none scores the live weights.
    fit(config)
    (tmp_path / "bench" / "step-000005").rename(tmp_path / "averaged")
    config["trainer"]["limit_val_batches"] = 1
    fit(config, f"--ckpt_path={tmp_path / 'last.ckpt'}", verb="validate")
    (tmp_path / "bench" / "validate").rename(tmp_path / "validated")
    del config["trainer"]["callbacks"][0]
    fit(config, f"--ckpt_path={tmp_path / 'last.ckpt'}", verb="validate")

    def clips(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.glob("videos/*/*")}

    assert clips(tmp_path / "validated") == clips(tmp_path / "averaged")
    assert summary(tmp_path / "validated")["cells"] == summary(tmp_path / "averaged")["cells"]
    live = clips(tmp_path / "bench" / "validate")
    assert live.keys() == clips(tmp_path / "averaged").keys() and live != clips(tmp_path / "averaged")
    assert summary(tmp_path / "bench" / "validate")["run"]["model"]["weights"] == "live"


def test_failures_leave_the_run_alone_and_show_in_the_coverage(
    config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config["trainer"]["callbacks"].append(bench(tmp_path / "bench", "test_benchmark.Broken"))
    fit(config)
    found = summary(tmp_path / "bench" / "step-000005")
    whys = {row["id"].partition("-")[0]: (row["stage"], row["why"]) for row in found["failures"]}
    assert whys == {
        "t2i": ("generate", "OSError: the disk is gone"),
        "v2v": ("score", "RuntimeError: the judge is ill"),
    }
    assert found["coverage"] == pytest.approx(10 / 20)
    (tmp_path / "file").write_text("in the way")  # no folder can be made here
    config["trainer"]["callbacks"][-1] = bench(tmp_path / "file" / "bench")
    assert len(fit(config)[0]["losses"]) == 10
    assert "benchmark: the folder cannot be used" in caplog.text


def test_a_run_that_is_trained_again_is_scored_again(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"] |= {"max_steps": 1}
    config["trainer"]["callbacks"].append(bench(tmp_path / "bench"))
    rows = tmp_path / "bench" / "step-000001" / "gen.jsonl"
    fit(config)
    before = rows.stat().st_mtime_ns
    fit(config)
    assert len(rows.read_text().splitlines()) == 6 and rows.stat().st_mtime_ns > before


@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 2), ("ddp", 3), ("ulysses", 2)])
def test_ranks_give_the_summary_of_one(config: dict[str, Any], tmp_path: Path, strategy: str, ranks: int) -> None:
    """Eight items of three tasks on ranks that are no divisor: some are made twice and count once."""
    config["trainer"]["max_steps"] = 1
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.0  # so that both end with the same weights
    alone, both = copy.deepcopy(config), copy.deepcopy(config)
    alone["trainer"]["callbacks"].append(bench(tmp_path / "alone", limit=8))
    both["trainer"]["callbacks"].append(bench(tmp_path / "both", limit=8))
    strategies = {
        "ddp": callback("lightning.pytorch.strategies.DDPStrategy", process_group_backend="gloo"),
        "ulysses": callback(
            "lightning.pytorch.strategies.ModelParallelStrategy",
            data_parallel_size=1,
            tensor_parallel_size=ranks,
            process_group_backend="gloo",
        ),
    }
    both["trainer"] |= {"devices": ranks, "strategy": strategies[strategy]}
    both["trainer"]["default_root_dir"] = str(tmp_path / "run2")
    fit(alone)
    fit(both, ranks=ranks)
    one, two = (tmp_path / name / "step-000001" for name in ("alone", "both"))
    assert summary(one) == summary(two) and summary(one)["coverage"] == 1
    assert {p.name for p in two.glob("*.jsonl")} == {f"gen.{rank}of{ranks}.jsonl" for rank in range(ranks)}
    assert sum(len(p.read_text().splitlines()) for p in two.glob("*.jsonl")) > len(list(one.glob("videos/*/*"))) == 8


def test_wandb_gets_a_table_with_the_clips_by_path(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MODE": "offline", "SILENT": "true", "DATA_DIR": str(tmp_path / "data")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # of earlier tests: the environment is read once
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    config["trainer"] |= {"max_steps": 1}
    config["trainer"]["logger"] = callback("callbacks.Wandb", save_dir=str(tmp_path))
    config["trainer"]["callbacks"].append(bench(tmp_path / "bench"))
    fit(config)
    wandb.teardown()
    (run,) = stored_runs(tmp_path / "wandb")
    found = summary(tmp_path / "bench" / "step-000001")
    for cell in found["cells"]:
        assert run.values(f"bench/toy/{cell['task']}/{cell['metric']}") == [(1, pytest.approx(cell["value"]))]
    assert "bench/toy/items" in run.names
    # What `wandb sync` will upload: the table, and beside it the files that it names.
    staged = [path.read_bytes() for path in (tmp_path / "data").rglob("staging/*")]
    (table,) = {content for content in staged if b'"column_types"' in content}
    table = json.loads(table)
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["task"] for row in rows] == ["t2i"] * 2 + ["v2v"] * 2 + ["rv2v"] * 2
    for row in rows:
        kind, suffix = ("image", "png") if row["task"] == "t2i" else ("clip", "mp4")
        shown = {name for name in row if name.endswith((" clip", " image")) and row[name]}
        assert shown == {*([] if row["task"] == "t2i" else [f"source {kind}"]), f"target {kind}", f"output {kind}"}
        made = tmp_path / "bench" / "step-000001" / "videos" / row["task"] / f"{row['id']}.{suffix}"
        assert row[f"output {kind}"]["path"].endswith(f"/{made.name}") and made.read_bytes() in staged
        assert row["prompt"] and (row["edit_done"] is None) == (row["task"] == "t2i")


def test_a_mistake_in_the_settings_is_told_before_training(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="every_n_steps"):
        BenchmarkCallback(ToyBenchmark(), str(tmp_path), every_n_steps=0)
    one = bench(tmp_path / "bench")
    one["init_args"]["benchmark"] = {**one["init_args"]["benchmark"], "init_args": {"tasks": ["v3v"]}}
    config["trainer"]["callbacks"].append(one)
    assert main(["fit", "-c", write_config(tmp_path / "c.yaml", config)]) == 78
    assert "v3v" in capsys.readouterr().err

"""What LightningCLI gets wrong if left to itself, one test for each."""

import ast
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from factories import build, callback, fit, keep_checkpoints, log_to_csv, logged_rows, make_config, write_config

import bernini
from bernini.cli import main
from bernini.errors import ConfigError
from bernini.lightning_cli import LINKS, run_lightning

ROOT = Path(bernini.__file__).parents[1]


@pytest.fixture
def config(wan: Path, shards: Path, tmp_path: Path) -> dict[str, Any]:
    return make_config(wan, shards, tmp_path / "run")


def parsed(config: dict[str, Any], tmp_path: Path, *more: str) -> Any:
    """What is built from a configuration and further arguments."""
    return run_lightning(["-c", write_config(tmp_path / "c.yaml", config), *more], run=False)


# -- merging and overriding ---------------------------------------------------------------------------------------


def test_later_files_go_over_earlier_ones_key_by_key(config: dict[str, Any], tmp_path: Path) -> None:
    second = write_config(tmp_path / "2.yaml", {"model": {"init_args": {"sampling": {"steps": 9}}}})
    third = write_config(tmp_path / "3.yaml", {"trainer": {"max_steps": 77}, "model.init_args.noise.shift": 3.0})
    cli = parsed(config, tmp_path, "-c", second, "-c", third)
    assert (cli.model.sampling.steps, cli.model.sampling.frames) == (9, 5)
    assert (cli.trainer.max_steps, cli.model.noise.shift) == (77, 3.0)


def test_command_line_reaches_every_level(config: dict[str, Any], tmp_path: Path) -> None:
    cli = parsed(
        config,
        tmp_path,
        "--model.expert=low",  # short for model.init_args.expert
        "--model.lora.rank=4",  # one field of a dataclass that was null
        "--model.init_args.sampling.omegas.txt=7",
        "--model.optimizer.init_args.lr=0.5",
        "--data.batch_size=3",
    )
    module = cli.model
    assert (module.expert, module.lora.rank, module.lora.targets[0]) == ("low", 4, "to_q")
    assert (module.sampling.omegas.txt, module.sampling.omegas.vid) == (7.0, 1.25)
    assert module.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.5
    assert cli.datamodule.batch_size == 3


def test_interpolation_within_a_file(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERNINI_TEST_ROOT", config["model"]["init_args"]["vae"])
    config["model"]["init_args"]["vae"] = "${oc.env:BERNINI_TEST_ROOT}/vae"
    config["data"]["init_args"]["predict"] = "${data.init_args.train}"
    cli = parsed(config, tmp_path)
    assert cli.datamodule.folders["predict"] == config["data"]["init_args"]["train"]


def test_value_that_an_interpolation_does_not_follow_is_told(config: dict[str, Any], tmp_path: Path) -> None:
    config["model"]["init_args"]["sampling"]["steps"] = "${trainer.max_steps}"
    with pytest.warns(UserWarning, match=r"sampling\.steps keeps the trainer\.max_steps of .*c\.yaml"):
        assert parsed(config, tmp_path, "--trainer.max_steps=7").model.sampling.steps == 2
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        parsed(config, tmp_path, "--trainer.max_steps=7", "--model.sampling.steps=7")
    assert not any("keeps the" in str(warning.message) for warning in told)


def test_links_follow_an_override(config: dict[str, Any], tmp_path: Path) -> None:
    cli = parsed(config, tmp_path, "--seed_everything=7")
    assert (cli.model.seed, cli.datamodule.seed) == (7, 7)


@pytest.mark.parametrize("target", [target for targets in LINKS.values() for target in targets])
def test_setting_what_a_link_sets_is_an_error(config: dict[str, Any], tmp_path: Path, target: str) -> None:
    for key in (target, target.replace(".init_args", "")):
        for more in ([f"--{key}=3"], [f"--{key}", "3"], ["-c", write_config(tmp_path / "dotted.yaml", {key: 3})]):
            with pytest.raises(ConfigError, match="would be ignored"):
                parsed(config, tmp_path, *more)
    part, *_ = target.split(".")
    config[part]["init_args"]["seed"] = 3
    with pytest.raises(ConfigError, match="would be ignored"):
        parsed(config, tmp_path)


# -- checkpoints --------------------------------------------------------------------------------------------------


def test_nothing_saves_hyperparameters_or_reads_the_estimated_steps() -> None:
    """The first would lay a checkpoint's values over the user's; the second makes Lightning forget loader states."""
    for package in ("bernini", "datamodules", "callbacks", "benchmarks"):
        for file in (ROOT / package).rglob("*.py"):
            names = {n.attr for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)}
            assert not names & {"save_hyperparameters", "estimated_stepping_batches"}, file


@pytest.mark.parametrize("schedule", [None, {"start_factor": 0.1, "total_iters": 3}])
def test_resumed_run_takes_the_new_learning_rate(
    config: dict[str, Any], tmp_path: Path, schedule: dict[str, Any] | None
) -> None:
    if schedule:
        name = "torch.optim.lr_scheduler.LinearLR"
        config["model"]["init_args"]["lr_scheduler"] = {"class_path": name, "init_args": schedule}
    keep_checkpoints(config, tmp_path)
    fit(config)
    fit(
        config,
        *("--ckpt_path", "auto", "--trainer.max_steps", "4"),
        *("--model.optimizer.init_args.lr", "0.5", "--model.optimizer.init_args.weight_decay", "0.25"),
    )
    (state,) = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"]
    assert state["param_groups"][0]["lr"] == pytest.approx(0.5)
    assert state["param_groups"][0]["weight_decay"] == 0.25
    assert state["state"][0]["step"] == 4


def test_auto_starts_afresh_then_resumes_and_a_second_run_may_use_the_folder(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config["trainer"]["callbacks"] = [callback("callbacks.EMA")]  # its state must pass torch's weights-only loader
    keep_checkpoints(config, tmp_path)
    assert len(fit(config, "--ckpt_path", "auto")[0]["losses"]) == 2
    assert "starting afresh" in capsys.readouterr().out
    assert len(fit(config, "--ckpt_path", "auto", "--trainer.max_steps", "5")[0]["losses"]) == 3
    assert "resuming from" in capsys.readouterr().out
    assert len(fit(config)[0]["losses"]) == 2
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 2


def test_saved_configuration_runs_again(config: dict[str, Any], tmp_path: Path) -> None:
    first = fit(config, "--seed_everything", "5")[0]["losses"]
    (tmp_path / "run" / "record-0.json").unlink()
    assert main(["fit", "-c", str(tmp_path / "run" / "config.yaml")]) == 0
    assert json.loads((tmp_path / "run" / "record-0.json").read_text())["losses"] == first


# -- secrets ------------------------------------------------------------------------------------------------------


def test_environment_values_are_written_nowhere(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "hunter2-and-a-half"
    run = tmp_path / "run"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("BERNINI_TEST_SECRET", secret)
    config["trainer"]["callbacks"] = [
        callback("callbacks.PredictionWriter", folder="a/${oc.env:BERNINI_TEST_SECRET}/b")
    ]
    config["trainer"]["logger"] = callback("lightning.pytorch.loggers.WandbLogger", project="p", save_dir=str(run))
    for _ in range(2):  # the second run has the same folder
        fit(config)
        wandb.finish()
    saved = (run / "config.yaml").read_text()
    assert "a/${oc.env:BERNINI_TEST_SECRET}/b" in saved
    config["trainer"]["max_steps"] = "${oc.env:BERNINI_TEST_SECRET}"
    assert main(["fit", "-c", write_config(tmp_path / "wrong.yaml", config), "--debug"]) == 78
    written = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    logs = [path for path in run.rglob("run-*.wandb")]
    assert len(logs) == 2 and all(b"RendererModule" in log.read_bytes() for log in logs)  # W&B knows the configuration
    assert not any(secret.encode() in content for content in written)
    assert not any(secret in text for text in capfd.readouterr())


# -- several ranks ------------------------------------------------------------------------------------------------

STRATEGIES = {
    "ddp": callback("lightning.pytorch.strategies.DDPStrategy", process_group_backend="gloo"),
    "fsdp2": callback(
        "lightning.pytorch.strategies.ModelParallelStrategy",
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
    ),
}


@pytest.mark.parametrize("missing", ["data_parallel_size", "tensor_parallel_size"])
def test_sizes_of_the_mesh_must_be_set(config: dict[str, Any], tmp_path: Path, missing: str) -> None:
    arguments = {k: 1 for k in ("data_parallel_size", "tensor_parallel_size") if k != missing}
    config["trainer"]["strategy"] = callback("lightning.pytorch.strategies.ModelParallelStrategy", **arguments)
    with pytest.raises(ConfigError, match=missing):
        parsed(config, tmp_path)


@pytest.fixture(scope="module")
def one_rank(
    wan: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Record, logged rows among it, and final checkpoint of four steps on one rank, two samples each."""
    root = tmp_path_factory.mktemp("one_rank")
    config = distributed(wan, shards, root)
    config["data"]["init_args"]["batch_size"] = 2
    record = fit(config)[0]
    return {**record, "rows": logged_rows(root)}, torch.load(root / "last.ckpt", weights_only=True)


def distributed(wan: Path, shards: Path, root: Path) -> dict[str, Any]:
    config = make_config(wan, shards, root)
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 4, "limit_val_batches": 8}
    config["data"]["init_args"]["max_samples"] = 5
    config["trainer"]["callbacks"] = [callback("callbacks.EMA", decay=0.9)]
    keep_checkpoints(config, root)
    log_to_csv(config, root, every=2)
    return config


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_are_one_rank_also_when_resumed(
    wan: Path, shards: Path, tmp_path: Path, one_rank: tuple[dict[str, Any], dict[str, Any]], strategy: str
) -> None:
    config = distributed(wan, shards, tmp_path)
    config["trainer"] |= {"devices": 2, "strategy": STRATEGIES[strategy]}
    if strategy == "fsdp2":
        config["trainer"]["callbacks"].append(callback("callbacks.SaveRenderer", folder=str(tmp_path / "out")))
    begun = fit(config, "--trainer.max_steps", "2", ranks=2)
    ended = fit(config, "--ckpt_path", "auto", ranks=2)
    record, state = one_rank
    mean = [(a + b) / 2 for a, b in zip(*(begun[r]["losses"] + ended[r]["losses"] for r in (0, 1)), strict=True)]
    assert mean == pytest.approx(record["losses"], abs=1e-5)
    assert [r["metrics"][-1] for r in ended] == [pytest.approx(record["metrics"][-1], abs=1e-5)] * 2
    assert [row["step"] for row in record["rows"]] == [1, 3]
    assert logged_rows(tmp_path) == [pytest.approx(row, abs=1e-5) for row in record["rows"]]
    average = averages(tmp_path / "last.ckpt")
    torch.testing.assert_close(average, state["callbacks"]["EMA"]["average"], rtol=0, atol=1e-5)
    if strategy == "fsdp2":
        exported = build(make_config(wan, shards, tmp_path, init_from=str(tmp_path / "out")), tmp_path)
        for name, value in exported.named_parameters():
            torch.testing.assert_close(value.data, average[name], rtol=0, atol=1e-6)


def averages(path: Path) -> dict[str, torch.Tensor]:
    """The moving average of a checkpoint, which is a file, or a folder when it is sharded."""
    whole = torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)
    return whole["callbacks"]["EMA"]["average"]

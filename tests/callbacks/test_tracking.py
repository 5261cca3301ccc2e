"""W&B runs, read back from what W&B leaves on disk."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import wandb
from factories import callback, fit, keep_checkpoints, make_config, write_config
from wandb_files import StoredRun, fresh_wandb, stored_bytes, stored_runs

from bernini.cli import main
from callbacks.tracking import ID_FILE, Wandb

SECRETS = {
    "BERNINI_TEST_ROOT": "hunter2-in-a-path",
    "BERNINI_TEST_TOKEN": "hunter3-on-the-command-line",
    "WANDB_API_KEY": "hunter4" * 6,
    "BERNINI_TEST_PRINTED": "hunter5-on-the-console",
}


@pytest.fixture(autouse=True)
def own_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    fresh_wandb(monkeypatch, tmp_path)
    yield
    wandb.teardown()


def tracked(folder: Path) -> list[StoredRun]:
    """Runs that were logged, once W&B has written all of them."""
    wandb.teardown()
    return stored_runs(folder / "tracked")


def logged(config: dict[str, Any], folder: Path, **arguments: Any) -> dict[str, Any]:
    """A configuration that logs every step to W&B."""
    config["trainer"] |= {
        "log_every_n_steps": 1,
        "logger": callback("callbacks.Wandb", project="p", save_dir=str(folder), **arguments),
    }
    return config


@pytest.fixture
def config(wan: Path, shards: Path, tmp_path: Path) -> dict[str, Any]:
    """Two steps, logged to W&B."""
    return logged(make_config(wan, shards, tmp_path / "run"), tmp_path / "tracked")


# -- what is logged -----------------------------------------------------------------------------------------------


class Chatter(L.Callback):
    """Prints a secret, as a library in a debugging mood would."""

    def on_train_batch_end(self, *_: Any) -> None:
        print(SECRETS["BERNINI_TEST_PRINTED"])


@pytest.fixture
def whole(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoredRun:
    """A run of four steps with validation, samples and secrets everywhere."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    samples = callback("callbacks.SampleVideos", folder=str(tmp_path / "samples"), every_n_steps=2, count=2)
    writer = callback("callbacks.PredictionWriter", folder="a/${oc.env:BERNINI_TEST_ROOT}/b")
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "limit_val_batches": 2}
    config["trainer"]["callbacks"] = [samples, writer, callback(f"{__name__}.Chatter")]
    config["data"]["init_args"]["batch_size"] = 2
    monkeypatch.setattr(sys, "argv", ["bernini", "fit", f"--token={SECRETS['BERNINI_TEST_TOKEN']}"])
    fit(config)
    (run,) = tracked(tmp_path)
    return run


def test_run_has_curves_configuration_and_samples_but_no_secrets(whole: StoredRun, tmp_path: Path) -> None:
    assert whole.exit_code == 0
    # curves, over the trainer's steps
    losses = {"loss", "loss_t2v", "loss_v2v"}
    assert whole.names >= {f"{stage}/{name}" for stage in ("train", "val") for name in losses}
    record = json.loads((tmp_path / "run" / "record-0.json").read_text())
    assert whole.values("train/loss") == [(i, pytest.approx(loss)) for i, loss in enumerate(record["losses"])]
    assert [value for _, value in whole.values("val/loss")] == [
        pytest.approx(metrics["val/loss"]) for metrics in record["metrics"]
    ]
    assert whole.axes == {"trainer/global_step": "", "*": "trainer/global_step"}
    # samples, as files of W&B's own
    shown = whole.values("samples")
    assert [step for step, _ in shown] == [0, 2, 4]
    for step, videos in shown:
        captions = [video["caption"] for video in videos["videos"]]
        assert captions == ["t2v-0001: make it green", "v2v-0000: make it red"]
        for video, caption in zip(videos["videos"], captions, strict=True):
            name = f"step-{step:06d}/{caption.split(':')[0]}.mp4"
            own, written = whole.folder / "files" / video["path"], tmp_path / "samples" / name
            assert not own.is_symlink() and own.read_bytes() == written.read_bytes()
    # the configuration
    assert whole.config["model"]["class_path"] == "bernini.renderer.module.RendererModule"
    assert whole.config["trainer"]["callbacks"][1]["init_args"]["folder"] == "a/${oc.env:BERNINI_TEST_ROOT}/b"
    # nothing else
    everything = stored_bytes(tmp_path / "tracked")
    assert not [name for name, secret in SECRETS.items() if secret.encode() in everything]
    assert whole.arguments == [] and whole.git[0] == ""


def test_wandb_keeps_the_commit_and_nothing_else_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "script.py").write_text("key = 'committed'\n")
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    for command in (
        ["init", "-q"],
        ["add", "."],
        [*who, "commit", "-qm", "m"],
        ["remote", "add", "origin", "https://hunter6@example.org/x.git"],
    ):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    (checkout / "script.py").write_text("key = 'hunter7'\n")
    monkeypatch.chdir(checkout)
    logger = Wandb(save_dir=str(tmp_path / "tracked"))
    logger.log_metrics({"a": 1.0}, step=0)
    logger.finalize("success")
    (run,) = tracked(tmp_path)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert run.git == ("", head.stdout.strip())
    assert b"hunter" not in stored_bytes(tmp_path / "tracked")


# -- which run ----------------------------------------------------------------------------------------------------


def test_run_goes_on_with_its_checkpoint_and_a_fresh_one_in_the_same_folders_is_another(
    config: dict[str, Any], tmp_path: Path
) -> None:
    keep_checkpoints(config, tmp_path / "kept")
    fit(config)
    first = (tmp_path / "kept" / ID_FILE).read_text().strip()
    fit(config, "--ckpt_path", "auto", "--trainer.max_steps", "4")
    fit(config)
    third = (tmp_path / "kept" / ID_FILE).read_text().strip()
    runs = tracked(tmp_path)
    assert [run.id for run in runs] == [first, first, third] and first != third
    assert [[step for step, _ in run.values("train/loss")] for run in runs] == [[0, 1], [2, 3], [0, 1]]


def test_id_of_the_environment_or_of_the_configuration_goes_before_the_checkpoints(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_checkpoints(config, tmp_path / "kept")
    fit(config)
    logger = Wandb(save_dir=str(tmp_path / "other"), id="configured")
    logger.go_on_from(str(tmp_path / "kept" / "last.ckpt"))
    assert logger.experiment.id == "configured"
    logger.finalize("success")
    monkeypatch.setenv("WANDB_RUN_ID", "swept")  # as an agent does
    fit(config, "--ckpt_path", "auto", "--trainer.max_steps", "3")
    assert tracked(tmp_path)[-1].id == "swept"


def test_ranks_are_one_run_with_the_samples_of_all(config: dict[str, Any], tmp_path: Path) -> None:
    gloo = callback("lightning.pytorch.strategies.DDPStrategy", process_group_backend="gloo")
    sample = callback("callbacks.SampleVideos", folder=str(tmp_path / "samples"), count=2)
    config["trainer"] |= {"devices": 2, "strategy": gloo, "callbacks": [sample]}
    config["trainer"]["logger"]["init_args"]["mode"] = "offline"
    fit(config, ranks=2)
    (run,) = tracked(tmp_path)
    for _, videos in run.values("samples"):
        captions = [video["caption"] for video in videos["videos"]]
        assert captions == ["t2v-0001: make it green", "v2v-0000: make it red"]


def test_failed_run_is_marked_as_failed(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"]["callbacks"] = [callback("factories.Terminate")]
    assert main(["fit", "-c", write_config(tmp_path / "c.yaml", config)]) == 143
    (run,) = tracked(tmp_path)
    assert run.exit_code == 1


# -- without W&B --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def losses(wan: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of four steps that nobody logs."""
    config = make_config(wan, shards, tmp_path_factory.mktemp("silent"))
    return fit(config, "--trainer.max_steps", "4")[0]["losses"]


def fit_and_warn(config: dict[str, Any], told: str) -> list[float]:
    """Losses of four steps, in which W&B's trouble is told once."""
    with pytest.warns(UserWarning, match=told) as warnings:
        record = fit(config, "--trainer.max_steps", "4")[0]
    assert sum("W&B" in str(warning.message) for warning in warnings) == 1
    return record["losses"]


def test_without_a_key_the_run_is_kept_offline(
    config: dict[str, Any], tmp_path: Path, losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    wandb.teardown()
    folder = tmp_path / "tracked" / "wandb" / "offline-run-"
    assert fit_and_warn(config, rf"no API key \(`wandb login`\): .*`wandb sync {folder}.*` uploads it") == losses
    (run,) = tracked(tmp_path)
    assert len(run.values("train/loss")) == 4


def test_what_cannot_be_a_key_is_refused(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "hunter8")
    assert main(["fit", "-c", write_config(tmp_path / "c.yaml", config)]) == 78
    said = capfd.readouterr().err
    assert "the W&B key is none" in said and "wandb login" in said and "hunter8" not in said


def test_unreachable_server_is_not_waited_for(
    config: dict[str, Any], tmp_path: Path, losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    closed = {"BASE_URL": "http://127.0.0.1:9", "INIT_TIMEOUT": "1", "HTTP_TIMEOUT": "1"}
    for name, value in {**closed, "API_KEY": SECRETS["WANDB_API_KEY"]}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()
    assert fit_and_warn(config, "cannot begin a run that is online .*: the run is kept offline") == losses
    run = next(run for run in tracked(tmp_path) if run.folder.name.startswith("offline-run-"))
    assert len(run.values("train/loss")) == 4


def test_folder_that_cannot_be_written(config: dict[str, Any], tmp_path: Path, losses: list[float]) -> None:
    (tmp_path / "tracked").mkdir()
    (tmp_path / "tracked" / "wandb").write_text("a file is in the way")
    assert fit_and_warn(config, "cannot begin a run that is offline .*: the run is not logged there") == losses


class KillService(L.Callback):
    """Kills W&B's service process after the first step."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            listing = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True)
            processes = [line.split(None, 2) for line in listing.stdout.splitlines()[1:]]
            services = [int(pid) for pid, parent, name in processes if int(parent) == os.getpid() and "wandb" in name]
            assert services
            for service in services:
                os.kill(service, signal.SIGKILL)
                time.sleep(0.2)


def test_service_that_dies_is_started_again(config: dict[str, Any], tmp_path: Path, losses: list[float]) -> None:
    config["trainer"]["callbacks"] = [callback(f"{__name__}.KillService")]
    assert fit_and_warn(config, "W&B lost something, training goes on: ConnectionResetError") == losses
    first, second = tracked(tmp_path)
    assert first.id in ("", second.id)  # what the first had in memory is gone with it
    assert second.values("train/loss") == [(i, pytest.approx(losses[i])) for i in (2, 3)]
    assert second.exit_code == 0


class FillDisk(L.Callback):
    """Takes the place away in which W&B keeps media."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (Path(trainer.logger.experiment.dir) / "media").write_text("a file is in the way")  # type: ignore[union-attr]


def test_samples_that_find_no_place_are_left_out(config: dict[str, Any], tmp_path: Path, losses: list[float]) -> None:
    sample = callback("callbacks.SampleVideos", folder=str(tmp_path / "samples"), every_n_steps=1, count=1)
    config["trainer"]["callbacks"] = [callback(f"{__name__}.FillDisk"), sample]
    assert fit_and_warn(config, "W&B lost something, training goes on: .*Error") == losses
    (run,) = tracked(tmp_path)
    assert "samples" not in run.names and len(run.values("train/loss")) == 4
    assert len(list((tmp_path / "samples").rglob("*.mp4"))) == 5

"""Every file under ``configs/`` is parsed, built and, where it is a whole run, run for a step on something tiny."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from bernini.cli import main
from bernini.lightning_cli import run_lightning

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
CONTENTS: dict[Path, dict[str, Any]] = {file: yaml.safe_load(file.read_text()) for file in FILES}
RUNS = [file for file, content in CONTENTS.items() if "class_path" in content.get("model", {})]
OVERLAYS = [file for file in FILES if file not in RUNS]
BASE = ROOT / "configs" / "renderer" / "wan21_1.3b.yaml"


def name(file: Path) -> str:
    return str(file.relative_to(ROOT / "configs"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, where relative paths of configurations end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUN", raising=False)
    return tmp_path


def tiny(file: Path, wan: Path, shards: Path) -> list[str]:
    """Arguments that put something tiny in the place of a configuration's weights, data and device."""
    arguments = ["--trainer.accelerator=cpu", "--trainer.max_steps=1", "--data.batch_size=2", "--data.workers=0"]
    model = CONTENTS[file]["model"]["init_args"]
    if "OneCycleLR" in str(model.get("lr_scheduler")):
        arguments += ["--model.lr_scheduler.init_args.total_steps=3"]
    if "VAEModule" in CONTENTS[file]["model"]["class_path"]:
        return [*arguments, "--model.architecture.base_dim=4", "--data.length=2", "--data.val_length=2"]
    arguments += [f"--model.vae={wan}", f"--model.text.encoder={wan}", "--model.text.rows=16"]
    arguments += [f"--data.train={shards}", f"--data.val={shards}", "--data.max_samples=1", "--model.sampling.steps=9"]
    if "architecture" in model:
        return [*arguments, "--model.architecture.in_channels=4", "--model.architecture.text_dim=12"]
    return [*arguments, f"--model.init_from={wan}"]


def test_there_are_files() -> None:
    assert len(RUNS) >= 8 and len(OVERLAYS) >= 4 and BASE in RUNS


@pytest.mark.parametrize("file", RUNS, ids=name)
def test_whole_configuration_trains(file: Path, wan: Path, shards: Path, elsewhere: Path) -> None:
    assert main(["fit", "-c", str(file), *tiny(file, wan, shards)]) == 0
    assert list(elsewhere.rglob("config.yaml"))
    if file.parent.name == "renderer":
        folder = elsewhere / "runs" / file.stem
        assert (folder / "config.yaml").is_file()
        assert (folder / "checkpoints" / "last.ckpt").exists()
        assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-000000", "step-000001"]
        assert list((folder / "model").rglob("*.safetensors"))


@pytest.mark.parametrize("file", OVERLAYS, ids=name)
def test_overlay_goes_over_a_whole_configuration(file: Path, wan: Path, shards: Path, elsewhere: Path) -> None:
    table = elsewhere / "data" / "train" / "text_features.safetensors"
    table.parent.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, table)
    arguments = [a for a in tiny(BASE, wan, shards) if "text.encoder" not in a]
    cli = run_lightning(["-c", str(BASE), f"--model.text.encoder={wan}", "-c", str(file), *arguments], run=False)
    changed = CONTENTS[file].get("trainer", {})
    if "devices" in changed:
        assert cli.trainer.world_size == changed["devices"]
    assert (cli.model.features.encoder is None) == ("prepared" in file.name)


@pytest.mark.parametrize("file", RUNS, ids=name)
def test_steps_are_counted_across_epochs(file: Path) -> None:
    trainer = CONTENTS[file]["trainer"]
    assert isinstance(trainer["max_steps"], int) and "max_epochs" not in trainer
    assert trainer["check_val_every_n_epoch"] is None and isinstance(trainer["val_check_interval"], int)
    assert trainer["val_check_interval"] % trainer.get("accumulate_grad_batches", 1) == 0  # between optimizer steps


@pytest.mark.parametrize("file", [file for file in RUNS if "Video" in CONTENTS[file]["data"]["class_path"]], ids=name)
def test_run_can_be_resumed_and_leaves_dividing_to_the_data(file: Path) -> None:
    trainer = CONTENTS[file]["trainer"]
    assert trainer["use_distributed_sampler"] is False
    kept = [c["init_args"] for c in trainer["callbacks"] if c["class_path"].endswith("ModelCheckpoint")]
    assert len(kept) == 1 and kept[0]["dirpath"] and kept[0]["save_last"] is True
    assert kept[0]["every_n_train_steps"] <= trainer["max_steps"]

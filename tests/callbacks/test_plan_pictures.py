from pathlib import Path
from typing import Any

import pytest
import wandb
from factories import callback, fit
from planners import make_planner_config
from wandb_files import fresh_wandb, stored_runs

from bernini.media import read_image


def drawing(run: Path, samples: int = 4) -> dict[str, Any]:
    """A run of four steps that is validated after two and four, and draws three plans each time."""
    planning = {"planning": {"steps": 2, "flow_steps": 1}, "validation": {"samples": samples}}
    config = make_planner_config(run, 4, **planning)
    config["trainer"] |= {"val_check_interval": 2, "num_sanity_val_steps": 1}
    config["trainer"]["callbacks"].append(callback("callbacks.PlanPictures", folder=str(run / "plans"), count=3))
    return config


def test_every_validation_leaves_pictures_of_its_plans(tmp_path: Path) -> None:
    fit(drawing(tmp_path))
    steps = sorted((tmp_path / "plans").iterdir())
    assert [step.name for step in steps] == ["step-000002", "step-000004"]
    drawn = [sorted(step.iterdir()) for step in steps]
    assert [file.name for file in drawn[0]] == [file.name for file in drawn[1]] and len(drawn[0]) == 3
    first, last = (read_image(files[0]).pixels for files in drawn)
    assert first is not None and last is not None and first.shape == (3, 1, 32 + 2 + 32, 32)
    assert (first[:, 0, :34] == last[:, 0, :34]).all()  # the target, and the line below it


def test_without_plans_there_are_no_pictures(tmp_path: Path) -> None:
    fit(drawing(tmp_path, samples=0))
    assert not (tmp_path / "plans").exists()


def test_plans_of_all_ranks_are_drawn(tmp_path: Path) -> None:
    config = drawing(tmp_path)
    ddp = callback("lightning.pytorch.strategies.DDPStrategy", process_group_backend="gloo")
    config["trainer"] |= {"max_steps": 2, "devices": 2, "strategy": ddp}
    config["data"]["init_args"] |= {"batch_size": 3}
    fit(config, ranks=2)
    assert len(list((tmp_path / "plans" / "step-000002").iterdir())) == 4  # half of three is two


def test_plans_reach_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_wandb(monkeypatch, tmp_path)
    config = drawing(tmp_path)
    config["trainer"] |= {"max_steps": 2}
    config["trainer"]["logger"] = callback("callbacks.Wandb", save_dir=str(tmp_path))
    fit(config)
    wandb.teardown()
    (run,) = stored_runs(tmp_path)
    ((step, shown),) = run.values("plans")
    assert step == 2 and len(shown["filenames"]) == len(shown["captions"]) == 3
    assert all((run.folder / "files" / name).is_file() for name in shown["filenames"])
    assert {"val/plan_cosine", "val/answers"} <= run.names

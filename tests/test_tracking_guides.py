"""The commands of docs/tracking.md and docs/sweeps.md, as they are written there."""

import re
import shlex
from pathlib import Path

import pytest
import wandb
from wandb.apis.public import Sweep
from wandb.cli.cli import cli as wandb_command
from wandb_files import fresh_wandb

from bernini.lightning_cli import run_lightning
from callbacks import Wandb

ROOT = Path(__file__).parents[1]
LINES = sorted(
    {
        line
        for guide in ("tracking", "sweeps")
        for block in re.findall(r"```\n(.*?)```", (ROOT / "docs" / f"{guide}.md").read_text(), re.DOTALL)
        for line in block.splitlines()
    }
)


def test_programs_are_known() -> None:
    programs = {next(word for word in shlex.split(line) if "=" not in word) for line in LINES}
    assert programs == {"bernini", "wandb", "python"}


@pytest.mark.parametrize("line", [line for line in LINES if re.match(r"(\w+=\S+ )*bernini fit -c configs", line)])
def test_fit_is_built(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh_wandb(monkeypatch, tmp_path)
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(line.partition("bernini fit ")[2])
    resumed = [] if "--ckpt_path" not in arguments else ["--ckpt_path", "auto"]
    assert arguments[len(arguments) - len(resumed) :] == resumed
    built = run_lightning([*arguments[: len(arguments) - len(resumed)], "--trainer.logger.project=other"], run=False)
    assert isinstance(built.trainer.logger, Wandb) and built.trainer.logger.name == "other"


@pytest.mark.parametrize("line", [line for line in LINES if " wandb " in f" {line}" and "import" not in line])
def test_wandb_knows_the_command(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verb, *arguments = shlex.split(line.partition("wandb ")[2])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for run in re.findall(r"runs/wandb/\S+", line):
        Path(run).mkdir(parents=True)
    wandb_command.commands[verb].make_context(verb, arguments)
    assert all(Path(word).is_file() for word in arguments if word.endswith(".yaml"))


def test_best_run_is_asked_for_as_wandb_answers() -> None:
    (line,) = [line for line in LINES if line.startswith("python")]
    compile(shlex.split(line)[2], line, "exec")
    assert callable(wandb.Api.sweep) and callable(Sweep.best_run)

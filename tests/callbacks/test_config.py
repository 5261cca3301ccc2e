from pathlib import Path
from typing import Any

import pytest
from factories import make_config, write_config
from omegaconf import OmegaConf

from bernini.cli import main
from bernini.environment import hide, remember_environment


def test_folder_that_cannot_be_written(
    wan: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("a file is in the way")
    config = make_config(wan, shards, tmp_path / "run")
    assert main(["fit", "-c", write_config(tmp_path / "c.yaml", config)]) == 78
    assert "the run's folder cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "config", "hidden"),
    [
        ("s3cr3t", {"a": ["s3cr3t", "x/s3cr3t/y"]}, {"a": ["${oc.env:B_TEST}", "x/${oc.env:B_TEST}/y"]}),
        ("1234567", {"a": 1234567, "b": 12345678}, {"a": "${oc.env:B_TEST}", "b": 12345678}),
        ("4", {"a": 4, "b": "v4", "c": True, "d": None}, {"a": "${oc.env:B_TEST}", "b": "v4", "c": True, "d": None}),
    ],
)
def test_values_become_expressions(
    monkeypatch: pytest.MonkeyPatch, value: str, config: dict[str, Any], hidden: dict[str, Any]
) -> None:
    monkeypatch.setenv("B_TEST", value)
    remember_environment()
    assert hide(config) == config
    assert OmegaConf.to_container(OmegaConf.create({"a": "${oc.env:B_TEST}"}), resolve=True) == {"a": value}
    assert hide(config) == hidden


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "B_SECRET", "b_password"])
def test_secrets_that_the_shell_filled_in_are_hidden(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "abcdef123456")
    remember_environment()
    given = {"a": "abcdef123456", "b": ["https://user:abcdef123456@host", "abcdef"]}
    hidden = f"${{oc.env:{name}}}"
    assert hide(given) == {"a": hidden, "b": [f"https://user:{hidden}@host", "abcdef"]}


@pytest.mark.parametrize(("name", "value"), [("B_TOKEN", "eleven-char"), ("B_FOLDER", "runs/of-today")])
def test_short_and_other_values_are_no_secrets(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    remember_environment()
    assert hide({"a": value}) == {"a": value}


def test_a_secret_from_the_command_line_is_written_and_shown_nowhere(
    wan: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "hunter2-and-a-half"
    monkeypatch.setenv("B_TEST_TOKEN", secret)
    config = write_config(tmp_path / "c.yaml", make_config(wan, shards, tmp_path / "run"))
    assert main(["fit", "-c", config, "--trainer.max_steps=1", f"--model.sampling.negative_prompt={secret}"]) == 0
    assert "negative_prompt: ${oc.env:B_TEST_TOKEN}" in (tmp_path / "run" / "config.yaml").read_text()
    assert main(["fit", "-c", config, f"--trainer.max_steps={secret}"]) == 78
    told = capsys.readouterr()
    assert "B_TEST_TOKEN" in told.err and secret not in told.out + told.err


def test_defaults_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("B_TEST", raising=False)
    remember_environment()
    config = OmegaConf.create({"a": "${oc.env:B_TEST,runs/here}"})
    assert hide(OmegaConf.to_container(config, resolve=True)) == {"a": "runs/here"}

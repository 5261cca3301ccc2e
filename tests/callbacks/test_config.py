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


def test_defaults_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("B_TEST", raising=False)
    remember_environment()
    config = OmegaConf.create({"a": "${oc.env:B_TEST,runs/here}"})
    assert hide(OmegaConf.to_container(config, resolve=True)) == {"a": "runs/here"}

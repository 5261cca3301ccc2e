"""The commands and the mix of docs/data.md as they are written there, with something tiny in the place of weights."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from test_configs import BASE, tiny

from bernini.lightning_cli import run_lightning
from datamodules.mixing import SourceConfig

ROOT = Path(__file__).parents[1]
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "data.md").read_text(), flags=re.MULTILINE)
TEXT = "\n".join(section for section in SECTIONS if section.startswith(("Order\n", "Mixing\n")))
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
LINES = [line.partition("  #")[0].strip() for kind, block in BLOCKS if not kind for line in block.splitlines()]


def test_there_are_commands() -> None:
    assert len(LINES) >= 4 and all(line.startswith(f"bernini fit -c {BASE.relative_to(ROOT)}") for line in LINES)


@pytest.mark.parametrize("line", LINES)
def test_command_is_built(line: str, wan: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)[2:]
    if words[-2:] == ["--ckpt_path", "auto"]:
        words = words[:-2]
    small = [word for word in tiny(BASE, wan, shards) if not word.startswith("--data.train")]
    cli = run_lightning([*words, *small], run=False)
    if any("mix_" in word for word in words):
        weights = {name: source.weight for name, source in cli.datamodule.folders["train"].items()}
        assert weights["video_pairs"] == {0: 11, 1000000: 0}
        assert weights["t2i"] == (20 if "--data.train.t2i.weight" in words else 31)


def test_mix_is_a_configuration(wan: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mix,) = [block for kind, block in BLOCKS if kind == "yaml"]
    (tmp_path / "mix.yaml").write_text(mix)
    monkeypatch.chdir(ROOT)
    small = [word for word in tiny(BASE, wan, shards) if not word.startswith("--data.train")]
    cli = run_lightning(["-c", str(BASE), "-c", str(tmp_path / "mix.yaml"), *small], run=False)
    given = yaml.safe_load(mix)["data"]["init_args"]["train"]
    assert cli.datamodule.folders["train"] == {name: SourceConfig(**source) for name, source in given.items()}

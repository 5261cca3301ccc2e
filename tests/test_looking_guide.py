"""What docs/data.md says of looking at data: its commands, and what they print."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from bernini.cli import main
from bernini.conversation import Conversation
from datamodules.index import INDEX, parse_index
from datamodules.shards import write_shards
from datamodules.tools.lint import RULES
from datamodules.toyworld import items
from datamodules.toyworld.shards import write_toy_shards

TEXT = (Path(__file__).parents[1] / "docs" / "data.md").read_text().partition("## Looking at data\n")[2]
BLOCKS = re.findall(r"```\n(.*?)\n```", TEXT, re.DOTALL)
COMMANDS, OUTPUTS = BLOCKS[::2], BLOCKS[1::2]
TASKS = {"v2v": 0.5, "rv2v": 0.25, "t2i": 0.25}


def without_numbers_of_encoders(text: str) -> str:
    """A text without fingerprint and megabytes, which depend on the version of the encoder."""
    return re.sub(r"\b[0-9a-f]{16}\b|\d+\.\d+ MB|\d+\.\d$", "*", text, flags=re.MULTILINE)


def break_samples() -> list[Conversation]:
    made = list(items(TASKS, 24, frames=17, height=64, width=96))
    made[2] = made[2].with_prompt("")
    (target,) = made[5].targets
    assert target.media and target.media.pixels is not None
    target.media = replace(target.media, pixels=target.media.pixels[:, :13])
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty-four samples of the toy world, and the same with three that are not right."""
    monkeypatch.chdir(tmp_path)
    write_toy_shards("shards", TASKS, 24, frames=17, height=64, width=96)
    write_shards(break_samples(), "broken", samples_per_shard=12)
    member = parse_index(Path("broken", INDEX).read_text(), "").shards[1].entries[0].members["v0.mp4"]
    shard = bytearray(Path("broken/shard-000001.tar").read_bytes())
    shard[member.at + member.size // 2] ^= 1
    Path("broken/shard-000001.tar").write_bytes(shard)


def test_commands_print_what_the_guide_says(folder: None, capsys) -> None:
    assert [command.split()[2] for command in COMMANDS] == ["info", "stats", "lint", "preview"]
    for command, told in zip(COMMANDS, OUTPUTS, strict=True):
        capsys.readouterr()
        assert main(shlex.split(command)[1:]) == (1 if "lint" in command else 0)
        shown = "".join(capsys.readouterr()).rstrip("\n")
        assert without_numbers_of_encoders(shown) == without_numbers_of_encoders(told)
    assert {path.name for path in Path("look").iterdir()} == {"sheet.png", "preview.html"}


def test_the_guide_tells_every_rule() -> None:
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", TEXT, re.MULTILINE)) == RULES

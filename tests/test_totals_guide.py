"""The code, the commands and the tables of docs/totals.md as they are written there."""

import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.quality.published.check import check, main
from benchmarks.quality.published.tables import published
from benchmarks.quality.totals.arena import Standing

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "totals.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def test_the_code_gives_what_it_says() -> None:
    names: dict = {}
    for block in blocks("python"):
        exec(block, names)
    assert (names["value"], names["n"]) == (pytest.approx(13 / 3), 2)
    assert names["best"] == "ours" and isinstance(names["standing"], Standing) and names["standing"].ties == 2


def test_the_commands_print_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("json")
    Path("mine.json").write_text(json.dumps(json.loads(block)))
    told = []
    for command in "".join(blocks("")).splitlines():
        words = shlex.split(command)
        assert words[:3] == ["bernini", "bench", "check"] and main(words[3:]) == 0
        told.append(capsys.readouterr().out)
    assert "201 of 210 totals" in told[0] and "2 of 2 totals" in told[1]


def test_the_tables_are_complete() -> None:
    differ = [one for one in check(published()) if one.verdict == "differs"]
    rows = {f"| {c.table} | {c.row} | {c.column} | {c.printed:g} | {c.recomputed:.4f} |" for c in differ}
    assert rows <= set(GUIDE.splitlines()) and len(rows) == 9
    modules = {path.stem for path in (ROOT / "benchmarks" / "quality" / "totals").glob("*.py")}
    assert set(re.findall(r"^\| [^|]+ \| `(\w+)` \| .* \|.*\|$", GUIDE, re.M)) >= modules - {
        "__init__",
        "arena",
        "catalogue",
        "records",
        "rules",
    }

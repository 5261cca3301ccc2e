"""Published tables and whether their totals follow."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.published.check import check, main
from benchmarks.quality.published.tables import published, read_tables
from benchmarks.quality.totals.catalogue import RULES
from bernini.errors import ConfigError, DataError

ROW: dict[str, Any] = {
    "benchmark": "geneval",
    "title": "mine",
    "source": "here",
    "scale": 1,
    "decimals": 2,
    "columns": ["overall", "single_object", "two_object", "counting", "colors", "position", "color_attr"],
    "rows": {"SD2.1": [0.5, 0.98, 0.51, 0.44, 0.85, 0.07, 0.17]},
}


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({"tables": [ROW | changes]}))
    return path


def test_published_totals_follow_but_for_those_known_not_to() -> None:
    checked = check(published())
    counts = {v: sum(one.verdict == v for one in checked) for v in ("follows", "differs", "parts missing")}
    assert counts == {"follows": 201, "differs": 9, "parts missing": 9}
    assert {(one.row, one.column) for one in checked if one.verdict == "differs"} == {
        ("FlashVideo-8fps", "semantic"),
        ("FlashVideo-8fps", "total"),
        ("SkyReels-A2-P14B", "total"),
        ("EchoVideo", "total"),
        ("VACE", "fidelity"),
        ("Kontext-dev", "overall"),
        ("Ovis-U1", "overall"),
        ("GPT-4o-Image", "overall"),
        ("DeepGen 1.0", "overall"),
    }


def test_every_table_says_where_it_stands() -> None:
    tables = published()
    assert len(tables) == 29 and len({t.title for t in tables}) == len(tables)
    assert all(t.source and t.rows for t in tables) and {t.benchmark for t in tables} <= RULES.keys()


def test_rounding_is_carried_through_and_no_further(tmp_path: Path) -> None:
    (follows,) = check(read_tables(write(tmp_path / "a.json")))
    assert follows.recomputed == pytest.approx(3.02 / 6) and follows.slack == pytest.approx(0.01)
    for printed, verdict in ((0.51, "follows"), (0.52, "differs"), (0.49, "differs")):
        rows = {"SD2.1": [printed, *ROW["rows"]["SD2.1"][1:]]}
        (one,) = check(read_tables(write(tmp_path / "b.json", rows=rows)))
        assert one.verdict == verdict
    (exact,) = check(read_tables(write(tmp_path / "c.json", decimals=4, decimals_of={"overall": 2})))
    assert exact.slack == pytest.approx(0.00505) and exact.verdict == "follows"


def test_a_total_without_its_parts_is_told_as_such(tmp_path: Path) -> None:
    rows = {"SD2.1": [0.5, None, *ROW["rows"]["SD2.1"][2:]], "other": [None, *ROW["rows"]["SD2.1"][1:]]}
    (one,) = check(read_tables(write(tmp_path / "a.json", rows=rows)))
    assert (one.row, one.verdict, one.recomputed) == ("SD2.1", "parts missing", None)


def test_the_command_names_what_does_not_follow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    told = capsys.readouterr().out
    assert "201 of 210 totals follow" in told and "| EchoVideo | total | 54.52 | 54.4320 | 0.0100 |" in told
    assert main(["--rows", str(write(tmp_path / "mine.json"))]) == 0
    told = capsys.readouterr().out
    assert "| mine | 1 | 1 | 1 | 0 | 0 | here |" in told and "1 of 1 totals follow" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rows": {"SD2.1": [0.5, 0.98]}}, "'SD2.1' has 2 figures for 7 columns"),
        ({"rows": {"SD2.1": ["0.5", *ROW["rows"]["SD2.1"][1:]]}}, "'0.5' in row 'SD2.1', column 'overall'"),
        ({"rows": {"SD2.1": [float("nan"), *ROW["rows"]["SD2.1"][1:]]}}, "nan in row"),
        ({"benchmark": "genevall"}, "did you mean 'geneval'"),
        ({"rows": 3}, "holds no tables"),
        ({"columns": None}, "holds no tables"),
        ({"scale": "much"}, "holds no tables"),
        ({"scale": 0}, "scale is not positive"),
        ({"decimals_of": {"elsewhere": 3}}, "decimals are of no column"),
        ({"columns": ["overall"] * 7}, "stands twice"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told.replace("(", r"\(")):
        read_tables(write(tmp_path / "a.json", **changes))


def test_a_file_that_is_not_there_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        main(["--rows", str(tmp_path / "none.json")])
    (tmp_path / "b.json").write_text('{"tables": [{"rows": {"a": [1], "a": [2]}}]}')
    with pytest.raises(DataError, match="'a' stands twice"):
        read_tables(tmp_path / "b.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match="holds no tables"):
        read_tables(tmp_path / "a.json")

import json

import pytest

from benchmarks.speed.small import VARIANTS, check_losses, main
from bernini.errors import ConfigError

SMALL = ["--device", "cpu", "--model", "tiny", "--text-rows", "8", "--steps", "1", "--warmup", "1", "--rank", "2"]


def test_every_variant_is_run_and_written(tmp_path, capsys):
    path = tmp_path / "small.json"
    figures = main([*SMALL, "--json", str(path)])
    assert json.loads(path.read_text()) == figures
    rows = figures["variants"]
    assert set(rows) == set(VARIANTS) and figures["tokens"] == 64
    assert all(row["fits"] and row["ms"]["median"] > 0 for row in rows.values())
    for kind in ("fp8", "int8"):
        assert rows[f"{kind}-swap"]["loss"] == rows[kind]["loss"]
        assert rows[kind]["loss"] == pytest.approx(rows["bf16"]["loss"], rel=0.01)
    assert rows["swap"]["loss"] == rows["bf16"]["loss"] != rows["fp8"]["loss"]
    assert "int8-swap" in capsys.readouterr().out


def test_clip_and_compiler_are_as_asked():
    more = [
        "--grid",
        "1",
        "4",
        "4",
        "--sources",
        "2",
        "--swap",
        "1",
        "--compile",
        "--backend",
        "eager",
        "--variants",
        "swap",
    ]
    figures = main([*SMALL, *more])
    assert figures["tokens"] == 48 and list(figures["variants"]) == ["swap"]


def test_a_swap_that_computes_something_else_is_refused():
    rows = {"int8": {"fits": True, "loss": 1.0}, "int8-swap": {"fits": True, "loss": 1.1}}
    with pytest.raises(RuntimeError, match="int8-swap begins at"):
        check_losses(rows)
    check_losses(rows | {"int8": {"fits": False}})


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--swap", "0"], ["--sources", "-1"], ["--cap", "0"]])
def test_numbers_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ConfigError, match=arguments[0]):
        main([*SMALL, *arguments])

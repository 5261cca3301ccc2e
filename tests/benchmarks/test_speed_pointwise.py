import json

import pytest
import torch

from benchmarks.speed.pointwise import SHAPES, as_it_is, check, main, tasks
from bernini.errors import ConfigError

CPU = torch.device("cpu")


def test_the_benchmark_checks_times_and_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "speed" / "pointwise.json"
    small = "--device cpu --shapes tiny --rounds 2 --repeats 2 --warmup 1 --backend aot_eager"
    main([*small.split(), "--json", str(path)])
    written = json.loads(path.read_text())
    shape = written["shapes"]["tiny"]
    assert (shape["tokens"], shape["dim"]) == SHAPES["tiny"]
    assert set(shape["errors"]) == {"modulated norm", "gated residual"}
    assert all(0 < error < 3e-3 for own in shape["errors"].values() for error in own.values())
    rows = 48 * 32 * 2 / written["ceilings"]["copy"] / 1e9  # milliseconds to read one tensor of rows
    passes = {"modulated norm|forward": 2, "modulated norm|both": 5, "gated residual|forward": 3}
    passes["gated residual|both"] = 7
    assert set(shape["functions"]) == set(passes)
    for what, own in shape["functions"].items():
        for way in ("eager", "compiled"):
            assert own[way]["share"] == pytest.approx(passes[what] * rows / own[way]["ms"]["median"])
    assert "gated residual, both" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed():
    for task in tasks(6, 16, CPU):
        check(task, {"eager": as_it_is, "compiled": as_it_is})
        with pytest.raises(RuntimeError, match=f"{task.name}, compiled, is off by"):
            check(task, {"eager": as_it_is, "compiled": lambda function: lambda *x: function(*x) * 1.01})


def test_bad_input_is_one_message():
    with pytest.raises(ConfigError, match="--repeats is 0"):
        main(["--device", "cpu", "--repeats", "0"])

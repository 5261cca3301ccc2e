import json
import math

import pytest
import torch

from benchmarks.speed.rope import Problem, irregular, main, rivals
from bernini.errors import ConfigError

CPU = torch.device("cpu")


def test_all_contestants_compute_the_same():
    problem = Problem.draw(3, [(2, 3, 4), (1, 5, 5), (3, 4, 2)], CPU)
    truth = [x.bfloat16().float() for x in problem.exact()]
    for name, rival in rivals(problem, "eager").items():
        for mine, right in zip(problem.both(rival)(), truth, strict=True):
            torch.testing.assert_close(mine.float(), right, rtol=2e-2, atol=0.1 if mine.ndim == 1 else 4e-2, msg=name)


@pytest.mark.parametrize("tokens", [256, 32_760, 75_600])
def test_irregular_segments_fill_the_sequence(tokens):
    grids = irregular(tokens)
    assert len(grids) == 64 and sum(map(math.prod, grids)) == tokens and min(map(min, grids)) > 0


def test_the_benchmark_checks_times_and_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "speed" / "rope.json"
    small = "--device cpu --shapes tiny --rounds 2 --repeats 2 --warmup 1 --backend aot_eager"
    main([*small.split(), "--json", str(path)])
    written = json.loads(path.read_text())
    contestants = {"released complex128", "diffusers", "diffusers compiled", "ours"}
    assert set(written["errors"]) == contestants
    shape = written["shapes"]["tiny"]
    assert shape["kernel"] == "reference" and shape["tokens"] == 256
    assert set(shape["contestants"]) == {*contestants, "64 segments"}
    ours = shape["contestants"]["ours"]
    floor = 2 * 2 * 256 * 2 * 128 * 2 / written["ceilings"]["copy"] / 1e9  # read and write q and k, two bytes each
    assert ours["forward"]["share"] == pytest.approx(floor / ours["forward"]["ms"]["median"])
    assert shape["speedup"]["ours"] == 1
    assert "64 irregular segments" in capsys.readouterr().out


def test_bad_input_is_one_message():
    with pytest.raises(ConfigError, match="--rounds is 0"):
        main(["--device", "cpu", "--rounds", "0"])

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.speed import sampling_step
from benchmarks.speed.renderer import MODELS
from benchmarks.speed.sampling import main
from benchmarks.speed.sampling_step import SamplingProblem, check_fp32, contestants
from bernini.errors import ConfigError
from bernini.flow.guidance import Omegas
from bernini.renderer.experts import Experts
from bernini.renderer.sampling import render

TINY = "--device cpu --model tiny --grid 2 4 4 --text 8 --given 9 --plan 5 --negative 6"


@pytest.fixture
def problem():
    return SamplingProblem(MODELS["tiny"], (2, 4, 4), 8, torch.float32, torch.device("cpu"), negative=6, steps=2)


def test_the_released_sampler_and_ours_make_the_same_latent(problem):
    assert check_fp32(problem) < 1e-5


def test_another_latent_is_not_timed(problem, monkeypatch):
    wrong = lambda experts, requests, config: render(experts, requests, replace(config, omegas=Omegas(tgt=0.6)))  # noqa: E731
    monkeypatch.setattr(sampling_step, "render", wrong)
    with pytest.raises(RuntimeError, match="ours is not the released sampler"):
        check_fp32(problem)


def test_the_released_sampler_runs_every_arm_by_itself_and_makes_its_keys_anew(problem):
    model = sampling_step.build(sampling_step.PackedWanTransformer3DModel, problem, None, None)
    tokens, rows = [], []
    model.register_forward_pre_hook(lambda _, args: tokens.append(args[0].token_lengths))
    model.blocks[0].attn2.to_k.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    runs = contestants(problem, model, None)
    runs["released"]()
    assert tokens == [(32,), (64,), (64,), (64,)] * 2
    assert rows == [512, 512, 512, 708] * 2
    tokens.clear(), rows.clear()
    runs["ours"]()
    assert tokens == [(32, 64, 64, 64)] * 2 and rows == [512 + 512 + 708]


def test_the_size_that_is_timed():
    problem = SamplingProblem(MODELS["14b"], (21, 30, 52), 100, torch.bfloat16, torch.device("cpu"))
    with torch.device("meta"):
        model = problem.architecture.build()
    assert Experts(model, boundary=0.0) and sum(p.numel() for p in model.parameters()) == 14_288_491_584
    request = problem.request
    assert problem.tokens == 32_760 and [len(c) for c in request.contexts.values()] == [512, 512, 800]
    assert request.planned and request.sources[0].latent.shape == request.shape == (16, 21, 60, 104)
    linear = 2 * 12.1e9 * 7 * 32_760  # weights that every token meets, and tokens of all arms
    attention = 4 * 40 * 5120 * 32_760**2 * (1 + 3 * 2**2)
    assert problem.flop == pytest.approx(linear + attention, rel=0.01)


def test_the_command_writes_its_figures(tmp_path, capsys):
    options = ["--steps", "2", "--layers", "1", "--compile", "--backend", "aot_eager"]
    figures = main([*TINY.split(), *options, "--json", str(tmp_path / "speed" / "sampling.json")])
    written = json.loads((tmp_path / "speed" / "sampling.json").read_text())
    rows = written["contestants"]
    assert rows == figures["contestants"]
    assert list(rows) == ["released", "ours", "released compiled", "ours compiled"]
    for row in rows.values():
        assert row["seconds"]["fastest"] <= row["seconds"]["median"] <= row["seconds"]["slowest"]
        assert row["error"] < 5e-2 and row["peak_gib"] > 0
    fastest = min(rows[name]["seconds"]["median"] for name in ("ours", "ours compiled"))
    assert written["ratio"] == pytest.approx(fastest / rows["released"]["seconds"]["median"])
    assert written["problem"]["context_rows"] == [512, 512, 512] and written["problem"]["steps"] == 2
    assert f"ours takes {written['ratio']:.3f} of the released arms' time" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "message"), [("--steps", "--steps is 0"), ("--layers", "--layers is 0")])
def test_impossible_numbers_are_refused(option, message):
    with pytest.raises(ConfigError, match=message):
        main([*TINY.split(), option, "0"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what happens without a GPU")
def test_without_a_gpu_the_command_says_what_works():
    with pytest.raises(ConfigError, match="no CUDA device"):
        main([])

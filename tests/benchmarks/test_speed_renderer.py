import json
import os
import runpy
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.contestants import VARIANTS, Problem, contestants
from benchmarks.speed.protocol import Sample, interleave, noise, relative_error, sample
from benchmarks.speed.renderer import MODELS, check_bf16, check_fp32, forward_flop, main, verdict, warm
from bernini.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def problem():
    return Problem(MODELS["tiny"], (2, 4, 4), text_rows=8, dtype=torch.bfloat16, device=CPU)


@pytest.mark.parametrize(
    ("architecture", "tokens", "published"),
    [
        (MODELS["1.3b"], 32_760, 2.83e14),
        (MODELS["1.3b"], 65_520, 9.61e14),
        (MODELS["14b"], 32_760, 1.68e15),
        (MODELS["14b"], 75_600, 6.52e15),
    ],
)
def test_operations_of_the_wan_sizes(architecture, tokens, published):
    assert forward_flop(architecture, tokens, 512) == pytest.approx(published, rel=5e-3)


def test_operations_are_those_that_torch_counts(problem):
    ours = contestants(problem, compiler=None)[1]
    ours.model.attention = "math"  # of the CPU's backends the only one that the counter knows
    with FlopCounterMode(display=False) as counter:
        ours.infer()
    blocks = [counter.get_flop_counts()[f"PackedWanTransformer3DModel.blocks.{i}"] for i in range(2)]
    assert sum(sum(block.values()) for block in blocks) == forward_flop(problem.architecture, 32, 8)


def test_the_benchmark_checks_times_and_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "speed" / "renderer.json"
    arguments = "--device cpu --model tiny --grid 2 4 4 --text-rows 8 --steps 4 --forwards 2 --warmup 1"
    figures = main([*arguments.split(), "--backend", "aot_eager", "--json", str(path)])
    written = json.loads(path.read_text())
    assert written["verdict"] == figures["verdict"]
    assert written["problem"]["tokens"] == 32
    rows = written["contestants"]
    assert set(rows) == {"stock eager", "ours eager", "stock compiled", "ours compiled", "stock default attention"}
    flop = forward_flop(MODELS["tiny"], 32, 8)
    for row in rows.values():
        assert row["step"]["ms"]["fastest"] <= row["step"]["ms"]["median"] <= row["step"]["ms"]["slowest"]
        assert row["step"]["mfu"] == pytest.approx(3 * flop / row["step"]["ms"]["median"] / 1e9 / 989)
        assert row["forward"]["tflops"] == pytest.approx(flop / row["forward"]["ms"]["median"] / 1e9)
        assert 0 < row["error"] < 2e-2
    assert written["verdict"] in capsys.readouterr().out


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_contestants_share_weights_and_learn_alike(weights, problem):
    rivals = contestants(replace(problem, weights=weights), compiler="eager", variants=["pointwise", "offload"])
    shared = dict(rivals[0].model.named_parameters())
    assert shared["blocks.0.ffn.net.2.weight"].dtype == weights
    for other in rivals[1:]:
        assert all(shared[name] is parameter for name, parameter in other.model.named_parameters())
    before = {name: parameter.clone() for name, parameter in shared.items()}
    made = [rival.gradients() for rival in rivals]
    for output, gradients in made[1:]:
        assert relative_error(output, made[0][0]) < 1e-2 and relative_error(gradients, made[0][1]) < 4e-2
    rivals[1].step()
    changed = {name for name, parameter in shared.items() if not torch.equal(parameter, before[name])}
    assert "blocks.1.attn2.to_q.weight" in changed and all(p.grad is None for p in shared.values())


def test_what_does_not_fit_is_left_out(problem, monkeypatch):
    rival = contestants(problem, compiler=None)[1]
    assert warm(rival, 1)
    rival.optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    assert not warm(rival, 1)
    assert all(p.grad is None for p in rival.model.parameters())


def test_variants_of_ours_share_its_weights_and_compute_the_same(problem, monkeypatch):
    monkeypatch.delenv("BERNINI_ROPE", raising=False)
    # Not the compiled kernel, which on a CPU takes a C++ compiler.
    small = "--device cpu --model tiny --grid 2 4 4 --text-rows 8 --steps 2 --forwards 2 --warmup 1 --backend aot_eager"
    rows = main([*small.split(), "--also", "reference", "outputs"])["contestants"]
    ours = {"ours eager", "ours eager, reference", "ours eager, outputs"}
    ours |= {"ours compiled", "ours compiled, reference", "ours compiled, outputs"}
    assert {name for name in rows if name.startswith("ours")} == ours
    rivals = {rival.name: rival for rival in contestants(problem, None, VARIANTS)}
    eager = rivals.pop("ours eager")
    seen = []
    eager.model.register_forward_pre_hook(
        lambda model, _: seen.append((os.environ.get("BERNINI_ROPE"), model.rope_saves))
    )
    for name in ("reference", "outputs"):
        assert rivals[f"ours eager, {name}"].model is eager.model
        assert torch.equal(rivals[f"ours eager, {name}"].infer(), eager.infer())
    plain = (None, "inputs")
    assert seen == [("reference", "inputs"), plain, (None, "outputs"), plain]


def test_a_wrong_model_is_not_timed(problem):
    rivals = contestants(problem, compiler=None)
    check_bf16(problem, rivals)
    with torch.no_grad():
        norm = rivals[1].model.blocks[0].attn1.norm_q
        norm.weight = torch.nn.Parameter(1.5 * norm.weight)
    with pytest.raises(RuntimeError, match="ours eager is off by"):
        check_bf16(problem, rivals)


def test_fp32_is_stock_to_rounding(problem):
    assert max(check_fp32(problem)) < 1e-6


def test_rounds_are_interleaved_and_turned():
    calls = []
    samples = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, 3, CPU)
    assert "".join(calls) == "abccbaabc"
    assert [len(rounds) for rounds in samples.values()] == [3, 3, 3]


def test_noise_is_how_far_the_rounds_of_one_call_part():
    still, moving = [Sample(10.0, 0)] * 4, [Sample(ms, 0) for ms in (11.0, 10.0, 11.0, 10.0)]
    assert noise({"a": still}) == 0
    assert noise({"a": still, "b": moving}) == pytest.approx(0.1)
    assert noise({"a": still[:1]}) == 0


@pytest.mark.parametrize(
    ("ours", "words", "ratio"), [(80.0, "faster than", 0.8), (99.5, "level with", 0.995), (110.0, "SLOWER than", 1.1)]
)
def test_the_verdict_names_the_fastest_stock(ours, words, ratio):
    steps = {"stock eager": 130.0, "ours eager": 50.0, "stock compiled": 100.0, "ours compiled": ours}
    text, measured = verdict(steps, spread=0.01)
    assert f"ours compiled is {words} stock compiled" in text
    assert measured == pytest.approx(ratio)


def test_a_sample_is_a_time():
    assert sample(lambda: sum(range(100_000)), CPU).ms > sample(lambda: None, CPU).ms


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--layers", "0"], ["--grid", "0", "4", "4"]])
def test_counts_below_one_are_refused(arguments):
    with pytest.raises(ConfigError, match=arguments[0]):
        main(["--device", "cpu", "--model", "tiny", *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what happens without a GPU")
def test_without_a_gpu_the_command_says_what_works(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["renderer"])
    with pytest.raises(SystemExit) as exit, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
        runpy.run_module("benchmarks.speed.renderer", run_name="__main__")
    assert exit.value.code == 78
    message = capsys.readouterr().err
    assert "no CUDA device" in message and "--device cpu" in message

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig

from benchmarks.speed.planner import main
from benchmarks.speed.planner_plan import PlanProblem, check_fp32, contestants
from benchmarks.speed.planner_shapes import SHAPES, TOWER
from benchmarks.speed.planner_train import Trainee, TrainProblem, forward_flop
from benchmarks.speed.protocol import relative_error
from bernini.errors import ConfigError
from bernini.planner.masking import visible
from bernini.planner.model import build
from bernini.planner.planning import PlanningConfig

CPU = torch.device("cpu")
PLAN = "plan --device cpu --model tiny --target 12 --sources 20 --text 8 --negative 5 --steps 4 --warmup 1 --rounds 2"
TRAIN = "train --device cpu --model tiny --target 6 --sources 9 --text 8 --labels 3 --samples 6 --warmup 1 --rounds 2"

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")


@pytest.fixture
def plan():
    config = PlanningConfig(steps=4, flow_steps=2, txt=1.7, img=1.3)
    return PlanProblem(SHAPES["tiny"], 12, 8, 20, 5, config, torch.float32, CPU)


@pytest.fixture
def train():
    return TrainProblem(SHAPES["tiny"], 6, 8, 9, 6, 3, torch.float32, CPU)


def tokens_of(model, call):
    """Tokens that each forward of the first and of the last layer is given while ``call`` runs."""
    seen = {layer: [] for layer in (model.text.layers[0], model.text.layers[-1])}
    hooks = [
        layer.register_forward_pre_hook(lambda m, args: seen[m].append(args[0].shape[:2].numel())) for layer in seen
    ]
    call()
    for hook in hooks:
        hook.remove()
    return list(seen.values())


@pytest.mark.parametrize(("txt", "img"), [(1.2, 1.0), (1.7, 1.3), (1.0, 1.0)])
def test_the_released_loop_and_ours_make_the_same_plans(plan, txt, img):
    assert check_fp32(replace(plan, config=replace(plan.config, txt=txt, img=img))) < 1e-5


def test_another_plan_is_not_timed(plan):
    with pytest.raises(RuntimeError, match="ours is not the released loop"):
        check_fp32(replace(plan, config=replace(plan.config, order="confidence")))


def test_the_released_loop_runs_every_stream_whole_through_all_layers(plan):
    model = plan.shape.build(torch.float32, CPU).eval()
    config = replace(plan.config, txt=1.2, img=1.0)
    runs = contestants(model.planner(), plan.request(torch.float32), config)
    cond, uncond, imgcond = 8 + 20 + 12, 5 + 12, 8 + 12
    first, last = tokens_of(model, runs["released loop"])
    assert first == last == [cond, uncond, imgcond] * 4 + [cond, uncond]
    first, last = tokens_of(model, runs["ours"])
    assert first == [28 + 8 + 5] + [2 * 12] * 4 + [12]  # all prefixes at once, then two streams' targets
    assert not last


def test_every_weight_counts_and_has_the_dtype_that_is_asked_for():
    model = SHAPES["tiny"].build(torch.bfloat16, CPU)
    assert all(parameter.any() and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_operations_are_those_that_torch_counts(train):
    trainee = Trainee(train, recompute=[], optimizer=False)
    draws = trainee.model.vit_decoder.draw(len(trainee.truth))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trainee.model(trainee.pack, trainee.features, trainee.masked, draws)
    counted = {str(op): flop for op, flop in counter.get_flop_counts()["Global"].items()}
    linear = counted["aten.mm"] + counted["aten.addmm"]
    parts = forward_flop(train.shape, trainee.pack, trainee.masked)
    assert linear == sum(parts.values()) - parts["attention"]


def test_attention_counts_the_pairs_that_see_each_other(train):
    trainee = Trainee(train, recompute=[], optimizer=False)
    pairs = visible(trainee.pack.token_type, trainee.pack.segment_id, trainee.pack.sample).sum().item()
    given, target, width, layers = 17, 6, 32, 3
    assert pairs == train.samples * (given * (given + 1) // 2 + target * (given + target))
    assert forward_flop(train.shape, trainee.pack, trainee.masked)["attention"] == 4 * width * layers * pairs


def test_the_size_that_is_timed():
    shape = SHAPES["7b"].cut(layers=8)
    vision = TOWER | {"out_hidden_size": 3584}
    with torch.device("meta"):
        model = build(shape.planner, Qwen2_5_VLConfig(text_config=shape.text, vision_config=vision))
    assert sum(p.numel() for p in model.vit_decoder.parameters()) == pytest.approx(1.438e9, rel=1e-3)
    assert sum(p.numel() for p in model.text.layers.parameters()) == pytest.approx(8 * 233.06e6, rel=1e-3)


@pytest.mark.parametrize(("recompute", "chunk"), [(["text"], None), (["flow"], None), ([], 20), (["text", "flow"], 20)])
def test_neither_recomputation_nor_chunks_change_the_loss(train, recompute, chunk):
    losses = []
    for names, rows in (([], None), (recompute, chunk)):
        trainee = Trainee(train, names, optimizer=True, chunk=rows)
        torch.manual_seed(0)
        losses.append([trainee.step() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] != losses[0][2]


def test_the_parts_of_a_step_make_its_gradients(train, monkeypatch):
    trainee = Trainee(train, ["text", "flow"], optimizer=False)
    forget = trainee._forget
    monkeypatch.setattr(trainee, "_forget", lambda: None)

    def gradients(*calls):
        forget()
        for call in calls:
            torch.manual_seed(0)
            call()
        named = trainee.model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    whole = gradients(trainee.step)
    with torch.no_grad(), trainee._autocast():
        hidden = trainee.model(trainee.pack, trainee.features, trainee.masked).hidden[trainee.masked]
        trainee.condition.data = trainee.model.connector.for_vit(hidden).float()
    gradients(trainee.flow_head)
    trainee.gradient = trainee.condition.grad.clone()
    parts = gradients(trainee.flow_head, trainee.language_model)
    assert whole.keys() == parts.keys()
    assert max(relative_error(parts[name], gradient) for name, gradient in whole.items()) < 2e-2


def test_a_pack_that_leaks_is_not_timed(train, monkeypatch):
    trainee = Trainee(train, [], optimizer=False)
    assert trainee.check() < 1e-2
    leaky = lambda kind, segment, sample, sources: visible(kind, segment)  # noqa: E731
    monkeypatch.setattr("bernini.planner.model.visible", leaky)
    with pytest.raises(RuntimeError, match="a sample in the pack is off by"):
        trainee.check()


def test_the_plan_command_writes_its_figures(tmp_path, capsys):
    figures = main([*PLAN.split(), "--json", str(tmp_path / "speed" / "plan.json")])
    written = json.loads((tmp_path / "speed" / "plan.json").read_text())
    assert written["contestants"] == figures["contestants"]
    rows = written["contestants"]
    assert list(rows) == ["released loop", "ours, no cache", "ours"]
    for row in rows.values():
        assert row["ms"]["fastest"] <= row["ms"]["median"] <= row["ms"]["slowest"]
        assert 0 < row["error"] < 5e-2 and row["cosine"] > 0.99
    speedup = rows["released loop"]["ms"]["median"] / rows["ours"]["ms"]["median"]
    assert written["speedup"]["ours"] == pytest.approx(speedup)
    assert "of the released loop's time: ours, no cache 1/" in (printed := capsys.readouterr().out)
    assert f"ours 1/{speedup:.2f}" in printed


@pytest.mark.parametrize(
    "options",
    [
        ["--compile", "--backend", "aot_eager", "--chunk", "30"],
        ["--weights", "fp32", "--optimizer", "--recompute", "text"],
    ],
)
def test_the_train_command_writes_its_figures(tmp_path, capsys, options):
    main([*TRAIN.split(), *options, "--json", str(tmp_path / "train.json")])
    written = json.loads((tmp_path / "train.json").read_text())
    calls, flop = written["calls"], written["forward_tflop"]
    assert set(calls) == {"step", "language model", "flow head"}
    assert calls["step"]["tflop"] == pytest.approx(3 * sum(flop.values()))
    assert calls["flow head"]["tflop"] == pytest.approx(3 * flop["flow head"])
    for row in calls.values():
        assert row["mfu"] == pytest.approx(row["tflop"] / row["ms"]["median"] * 1e3 / 989)
    share = calls["flow head"]["ms"]["median"] / calls["step"]["ms"]["median"]
    assert written["flow_head_share"] == pytest.approx(share)
    assert written["problem"]["tokens"] == 6 * 23
    assert f"the flow head takes {share:.1%} of the step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([*PLAN.split(), "--target", "0"], "--target is 0"),
        ([*PLAN.split(), "--warmup", "0"], "--warmup is 0"),
        ([*TRAIN.split(), "--samples", "0"], "--samples is 0"),
        ([*TRAIN.split(), "--labels", "5"], "half of the text"),
        ([*TRAIN.split(), "--chunk", "0"], "--chunk is 0"),
    ],
)
def test_impossible_numbers_are_refused(command, message):
    with pytest.raises(ConfigError, match=message):
        main(command)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what happens without a GPU")
def test_without_a_gpu_the_command_says_what_works():
    with pytest.raises(ConfigError, match="no CUDA device"):
        main(["plan"])

"""The planner on CUDA: block masks give what tables give, CUDA graphs what steps give, and chunks what whole passes."""

from dataclasses import replace

import pytest
import torch

from benchmarks.speed.planner_plan import PlanProblem, check_fp32
from benchmarks.speed.planner_shapes import SHAPES, Shape
from benchmarks.speed.planner_train import TrainProblem
from bernini.planner.flow_head import FlowHead, FlowHeadConfig
from bernini.planner.mllm import ATTENTION
from bernini.planner.planning import PlanningConfig
from bernini.planner.template import pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
TEXT = SHAPES["tiny"].text | {
    "hidden_size": 64,  # heads of 16, the least that FlexAttention takes
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 8e-2)])
def test_blocks_and_table_train_alike(precision, tolerance, relative_error):
    problem = TrainProblem(
        shape=Shape(TEXT, replace(SHAPES["tiny"].planner, flow_width=32)),
        samples=3,
        text=70,
        sources=150,
        target=90,
        labels=20,
        weights=torch.float32,
        device=CUDA,
    )
    model = problem.shape.build(problem.weights, CUDA).train()
    packed = pack([problem.sample(number) for number in range(problem.samples)]).to(CUDA)
    masked = problem.masked().to(CUDA)
    features = torch.randn(problem.samples * (problem.sources + problem.target), TEXT["hidden_size"], device=CUDA)
    draws = model.vit_decoder.draw(int(masked.sum()), device=CUDA)
    found = []
    for attention in (ATTENTION, "sdpa"):
        model.text.config._attn_implementation = attention
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            output = model(packed, features, masked, draws)
        loss = output.visual.mean() + 0.2 * torch.nn.functional.cross_entropy(output.logits.float(), output.labels)
        weights = [
            p for name, p in model.named_parameters() if "language_model" in name or "connector.proj_vit" in name
        ]
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        found.append([output.hidden, output.logits, output.visual, *(g for g in grads if g is not None)])
    assert len(found[0]) == len(found[1]) > 20
    for blocks, table in zip(*found, strict=True):
        assert relative_error(blocks.float(), table.float()) < tolerance


SETTINGS = PlanningConfig(steps=8, flow_steps=3, txt=1.7, img=1.3)


def plan_problem(**values) -> PlanProblem:
    given = {"target": 30, "text": 12, "sources": 40, "negative": 5, "config": SETTINGS, "dtype": torch.float32}
    return PlanProblem(shape=Shape(TEXT, replace(SHAPES["tiny"].planner, flow_width=32)), device=CUDA, **given | values)


def test_all_ways_to_plan_make_the_released_plan():
    assert check_fp32(plan_problem()) < 1e-4


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_graphs_plan_as_steps_do(order, dtype, tolerance, relative_error):
    """Requests of other lengths and seeds are planned from the same recording, in and outside of inference mode."""
    planner = plan_problem().shape.build(dtype, CUDA).eval().planner()
    config = replace(SETTINGS, order=order)
    sizes = [{}, {"text": 20, "negative": 9}, {"sources": 10}]
    requests = [replace(plan_problem(**size).request(dtype), seed=n) for n, size in enumerate(sizes)]
    recordings = set()
    for together in (requests[:2], requests[1:], requests[::-2]):
        plans = planner.plan(together, config)
        recordings.add(id(planner._recording))
        assert planner._recording.draw._graph is not None and planner._recording.targets._graph is not None
        for plan, expected in zip(plans, planner.plan(together, replace(config, cuda_graphs=False)), strict=True):
            for name, x in vars(plan).items():
                assert relative_error(x.float(), vars(expected)[name].float()) < tolerance, name
    assert len(recordings) == 1
    with torch.inference_mode():
        plans = planner.plan(requests[:2], config)
    assert relative_error(plans[0].embeds.float(), planner.plan(requests[:2], config)[0].embeds.float()) < tolerance


def test_graphs_outlive_the_mixed_precision_that_they_were_recorded_in(relative_error):
    planner = plan_problem().shape.build(torch.float32, CUDA).eval().planner()
    request = plan_problem().request(torch.float32)
    plans, recordings = [], []
    for graphs in (False, True, True):
        with torch.autocast("cuda", torch.bfloat16):
            plans += planner.plan([request], replace(SETTINGS, cuda_graphs=graphs))
        recordings.append(planner._recording)
        torch.full((2**22,), torch.nan, device=CUDA)  # over what autocast has freed
    assert recordings[0] is None and recordings[1] is recordings[2] is not None
    for plan in plans[1:]:
        assert relative_error(plan.embeds, plans[0].embeds) < 5e-2
    [exact] = planner.plan([request], SETTINGS)
    assert 1e-4 < relative_error(plans[0].embeds, exact.embeds) < 5e-2


def test_few_steps_are_not_recorded():
    planner = plan_problem().shape.build(torch.float32, CUDA).eval().planner()
    planner.plan([plan_problem().request(torch.float32)], replace(SETTINGS, steps=4))
    assert planner._recording is None


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 8e-2)])
def test_chunks_train_as_the_whole_does_in_less_memory(precision, tolerance, compiled, relative_error):
    found, peaks = [], []
    for chunk in (None, 512):
        torch.manual_seed(0)
        head = FlowHead(FlowHeadConfig(48, 40, width=128, depth=6, chunk=chunk)).to(CUDA)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.08)
        c, truth = torch.randn(256, 40, device=CUDA, requires_grad=True), torch.randn(256, 48, device=CUDA)
        draws = head.draw(256, device=CUDA)
        if compiled:
            for block in head.net.res_blocks:
                block.compile(fullgraph=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = head.loss(c, truth, draws)
        loss.mean().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append([loss.detach(), c.grad, *(p.grad for p in head.parameters())])
    for whole, chunked in zip(*found, strict=True):
        assert relative_error(chunked, whole) < tolerance
    assert peaks[1] < peaks[0] / 2

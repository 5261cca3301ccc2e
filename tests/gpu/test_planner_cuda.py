"""The planner on CUDA: FlexAttention over block masks gives what the table gives, losses and gradients included."""

from dataclasses import replace

import pytest
import torch

from benchmarks.speed.planner_shapes import SHAPES, Shape
from benchmarks.speed.planner_train import TrainProblem
from bernini.planner.mllm import ATTENTION
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

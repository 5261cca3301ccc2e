"""Masked planning as the released loop does it, beside ours on the same weights, order and noise."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.speed.planner_shapes import Shape
from benchmarks.speed.protocol import Timing, interleave, noise, relative_error
from bernini.flow.noise import TRAIN_STEPS
from bernini.planner.flow_head import Stream as StreamName
from bernini.planner.masking import SOURCE, TARGET, TEXT
from bernini.planner.mllm import additive_mask, run_text
from bernini.planner.planning import Plan, Planner, PlanningConfig, PlanRequest, Stream
from bernini.planner.reveal import reveal_counts, reveal_order

NAMES: tuple[StreamName, ...] = ("cond", "uncond", "imgcond")
FP32_TOLERANCE = 1e-4
# Roundings to bf16 differ, and what a step draws is fed back to all that follow.
BF16_SLACK = 2.0


@dataclass(frozen=True)
class PlanProblem:
    """What is planned.

    Attributes:
        shape: Shape of the planner.
        target: Tokens to plan.
        text: Tokens of the prompt, which the streams ``cond`` and ``imgcond`` have.
        sources: Tokens of the sources, which ``cond`` alone has.
        negative: Tokens of the negative prompt, which ``uncond`` alone has.
        config: How to plan.
        dtype: Dtype of the weights.
        device: Where it runs.
    """

    shape: Shape
    target: int
    text: int
    sources: int
    negative: int
    config: PlanningConfig
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        text, c = self.shape.text, self.config
        return (
            f"{text['num_hidden_layers']} layers of width {text['hidden_size']}, {self.target} target tokens behind "
            f"{self.text + self.sources} (cond), {self.negative} (uncond), {self.text} (imgcond); {c.steps} steps, "
            f"{c.flow_steps} of the flow head, txt {c.txt}, img {c.img}, {str(self.dtype).removeprefix('torch.')}"
        )

    def facts(self) -> dict[str, Any]:
        """The problem as JSON takes it."""
        return asdict(self) | {"dtype": str(self.dtype), "device": self.device.type}

    def request(self, dtype: torch.dtype) -> PlanRequest:
        """The streams, of random embeddings that bf16 holds exactly; positions count up, which costs the same."""
        generator = torch.Generator(self.device).manual_seed(1)
        width = self.shape.text["hidden_size"]

        def draw(rows: int) -> Tensor:
            return torch.randn(rows, width, generator=generator, device=self.device).bfloat16().to(dtype)

        text, sources, negative, token = draw(self.text), draw(self.sources), draw(self.negative), draw(1)
        hidden = token.expand(self.target, -1)

        def stream(words: Tensor, seen: Tensor) -> Stream:
            counts = torch.tensor([len(words), len(seen), self.target], device=self.device)
            kind = torch.tensor([TEXT, SOURCE, TARGET], device=self.device).repeat_interleave(counts)
            index = torch.arange(len(kind), device=self.device)
            segment = torch.where(kind == TEXT, index, len(kind) + kind)
            return Stream(torch.cat([words, seen, hidden]), index.expand(3, -1), kind, segment)

        return PlanRequest(stream(text, sources), stream(negative, sources[:0]), stream(text, sources[:0]))


@torch.no_grad()
def plan_as_released(planner: Planner, request: PlanRequest, config: PlanningConfig) -> Plan:
    """The released loop: in each step each of the three streams whole, through all layers and the final norm.

    The flow head, too, evaluates three streams, whatever their weights. Two more forwards make the contexts. Masks are
    made once, and the language head, whose logits nobody reads, is left out: both speak for the released loop.

    Args:
        planner: The planner.
        request: With a stream ``imgcond``, i.e. with sources.
        config: How to plan; its order is ``random``, and its cache is not looked at.
    """
    streams: dict[StreamName, Stream] = {name: getattr(request, name) for name in NAMES}
    embeds = {name: stream.embeds.clone() for name, stream in streams.items()}
    masks = {name: additive_mask(stream.visible, stream.embeds.dtype) for name, stream in streams.items()}

    def read(name: StreamName) -> Tensor:
        positions = streams[name].position_ids[:, None]
        return run_text(planner.text_model, embeds[name][None], positions, masks[name], final=True).penultimate[0]

    target, head = request.cond.target, planner.flow_head
    device, width = request.cond.embeds.device, request.cond.embeds.shape[1]
    order = reveal_order(len(target), request.seed).to(device)
    generator = torch.Generator().manual_seed(request.seed)
    for count in filter(None, reveal_counts(len(target), config.steps)):
        order, chosen = order[:-count], order[-count:].sort().values
        c = torch.cat([planner.connector.for_vit(read(name)[streams[name].target])[chosen] for name in NAMES])
        x = torch.randn(count, width, generator=generator).to(device)
        for sigma, following in pairwise([*head.sigmas(config.flow_steps).tolist(), 0.0]):
            velocity = head(x.repeat(3, 1), x.new_full((3 * count,), TRAIN_STEPS * sigma), c).float()
            cond, uncond, imgcond = velocity.chunk(3)
            guided = uncond + config.img * (imgcond - uncond) + config.txt * (cond - imgcond)
            x = x + (following - sigma) * guided
        for name, stream in streams.items():
            embeds[name][stream.target[chosen]] = x.to(embeds[name].dtype)

    rows = planner.connector.for_gen(read("cond"))
    empty = planner.connector.for_gen(read("uncond")[request.uncond.given])
    return Plan(embeds["cond"][target], rows, rows[request.cond.given], rows[target], empty)


def contestants(planner: Planner, request: PlanRequest, config: PlanningConfig) -> dict[str, Callable[[], Plan]]:
    """The released loop, ours without the prefix cache, and ours; on CUDA also ours without graphs, and recording them.

    What records is a new planner's first plan; ours finds the recording of its last plan.
    """

    def ours(cache: bool = True, graphs: bool = True) -> Plan:
        return planner.plan([request], replace(config, cache=cache, cuda_graphs=graphs))[0]

    def recording() -> Plan:
        return Planner(planner.text_model, planner.connector, planner.flow_head).plan([request], config)[0]

    runs: dict[str, Callable[[], Plan]] = {
        "released loop": lambda: plan_as_released(planner, request, config),
        "ours, no cache": lambda: ours(cache=False),
    }
    if request.cond.embeds.is_cuda:
        runs |= {"ours, no graphs": lambda: ours(graphs=False), "ours, recording": recording}
    return runs | {"ours": ours}


def check_fp32(problem: PlanProblem) -> float:
    """Compare ours with the released loop in fp32, on two layers, two blocks of the flow head and six steps.

    Returns:
        Largest relative L2 error of plan and contexts.

    Raises:
        RuntimeError: It is above 1e-4.
    """
    planner = problem.shape.cut(2, 2).build(torch.float32, problem.device).eval().planner()
    config = replace(problem.config, steps=min(6, problem.config.steps))
    runs = contestants(planner, problem.request(torch.float32), config)
    released, *others = [run() for run in (*runs.values(), runs["ours"])]  # once more, from what was recorded
    tensors = {name: x for name, x in vars(released).items() if isinstance(x, Tensor)}
    errors = [relative_error(getattr(plan, name), x) for plan in others for name, x in tensors.items()]
    if not max(errors) < FP32_TOLERANCE:
        raise RuntimeError(f"ours is not the released loop in fp32: off by {max(errors):.1e}")
    return max(errors)


def measure_plans(problem: PlanProblem, rounds: int, warmup: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Check, then time.

    Args:
        problem: What is planned.
        rounds: Timed plans of each contestant.
        warmup: Untimed ones before, at least one.
        say: Prints progress.

    Returns:
        All figures, ready for JSON.

    Raises:
        RuntimeError: Ours is not the released loop in fp32, or much further from fp32 than it is in bf16.
    """
    off = check_fp32(problem)
    say(f"fp32, ours against the released loop, 2 layers, 6 steps: off by {off:.1e}")
    model = problem.shape.build(problem.dtype, problem.device).eval()
    exact = deepcopy(model).float()
    reference = plan_as_released(exact.planner(), problem.request(torch.float32), problem.config).embeds
    del exact
    request = problem.request(problem.dtype)
    runs = contestants(model.planner(), request, problem.config)
    plans = {name: [run() for _ in range(warmup)][-1].embeds for name, run in runs.items()}
    errors = {name: relative_error(embeds, reference) for name, embeds in plans.items()}
    say("off from fp32: " + ", ".join(f"{name} {error:.2e}" for name, error in errors.items()))
    if not max(errors.values()) <= BF16_SLACK * errors["released loop"]:
        raise RuntimeError(f"ours is further from fp32 than the released loop: {errors}")

    resident = sum(p.nbytes for p in model.parameters())
    samples = interleave(runs, rounds, problem.device)
    released = plans["released loop"].float()
    table: dict[str, Any] = {
        name: {
            "ms": asdict(Timing.of(s.ms for s in taken)),
            "peak_gib": (resident + max(s.memory for s in taken)) / 2**30,
            "beyond_weights_gib": max(s.memory for s in taken) / 2**30,
            "error": errors[name],
            "cosine": cosine_similarity(plans[name].float(), released, dim=-1).mean().item(),
        }
        for name, taken in samples.items()
    }
    median = {name: row["ms"]["median"] for name, row in table.items()}
    speedup = {name: median["released loop"] / ms for name, ms in median.items()}
    return {"fp32": off, "contestants": table, "noise": noise(samples), "speedup": speedup}

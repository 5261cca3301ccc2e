"""A training step of the planner: operations and time, whole and divided into language model and flow head."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.planner_shapes import Shape
from benchmarks.speed.protocol import interleave, noise, rates, relative_error
from bernini.planner.flow_head import FREQUENCIES, Draws
from bernini.planner.masking import MASK_RATIOS, SOURCE, TARGET, TEXT, draw_masked, visible
from bernini.planner.mllm import embed_inputs, run_text
from bernini.planner.model import PlannerOutput
from bernini.planner.template import IGNORED, PlannerPack, PlannerSample, pack

NTP, TASK = 0.2, "v2v"
ALONE_TOLERANCE = 5e-2  # bf16


@dataclass(frozen=True)
class TrainProblem:
    """What is trained on.

    Attributes:
        shape: Shape of the planner.
        samples: Samples of the pack.
        text: Text tokens of each.
        sources: Source tokens of each, between the halves of the text.
        target: Target tokens of each, behind; Beta masks of the task v2v hide some.
        labels: Labelled text tokens of every fifth sample, the last ones in front of the target.
        weights: Dtype of the weights; autocast computes in bf16.
        device: Where it runs.
    """

    shape: Shape
    samples: int
    text: int
    sources: int
    target: int
    labels: int
    weights: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        """Tokens of the pack."""
        return self.samples * (self.text + self.sources + self.target)

    def __str__(self) -> str:
        text, planner = self.shape.text, self.shape.planner
        return (
            f"{text['num_hidden_layers']} layers of width {text['hidden_size']}, flow head {planner.flow_width} x "
            f"{planner.flow_depth}; {self.samples} samples, {self.tokens:,} tokens, {self.target} to plan in each; "
            f"bf16 autocast over {str(self.weights).removeprefix('torch.')} weights"
        )

    def facts(self) -> dict[str, Any]:
        """The problem as JSON takes it."""
        return asdict(self) | {"weights": str(self.weights), "device": self.device.type, "tokens": self.tokens}

    def sample(self, number: int) -> PlannerSample:
        """One sample of random words."""
        before = self.text - self.text // 2
        counts = torch.tensor([before, self.sources, self.text - before, self.target])
        kind = torch.tensor([TEXT, SOURCE, TEXT, TARGET]).repeat_interleave(counts)
        index = torch.arange(len(kind))
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(self.shape.text["vocab_size"], index.shape, generator=generator)
        labels = torch.full_like(ids, IGNORED)
        if number % 5 == 0 and self.labels:
            end = len(ids) - self.target
            labels[end - self.labels : end] = ids[end - self.labels : end]
        segment = torch.where(kind == TEXT, index, len(kind) + kind)
        return PlannerSample(ids, kind, segment, index.expand(3, -1), labels, [], None)

    def masked(self) -> Tensor:
        """Bool ``[tokens]``: hidden target tokens."""
        generator, ratio = torch.Generator().manual_seed(0), MASK_RATIOS[TASK]
        given = torch.zeros(self.text + self.sources, dtype=torch.bool)
        rows = [draw_masked(self.target, ratio, generator) for _ in range(self.samples)]
        return torch.cat([part for row in rows for part in (given, row)])


def forward_flop(shape: Shape, packed: PlannerPack, masked: Tensor) -> dict[str, float]:
    """Operations of the matrix products of one forward pass, a multiply-add counted as two.

    Attention counts the pairs of tokens that see each other, ``lm_head`` the labelled tokens. The flow head's rows are
    draws times hidden tokens, but its embedding of the condition is made once for all draws. A training step is three
    times this; what is recomputed is not counted.
    """
    text, planner = shape.text, shape.planner
    width, ffn, tokens = text["hidden_size"], text["intermediate_size"], len(packed.ids)
    keys = width // text["num_attention_heads"] * text["num_key_value_heads"]
    asked, hidden = int((packed.labels[1:] != IGNORED).sum()), int(masked.sum())
    layers = text["num_hidden_layers"]
    pairs = 0
    for number in packed.sample.unique():
        own = packed.sample == number
        pairs += int(visible(packed.token_type[own], packed.segment_id[own]).sum())

    w, rows = planner.flow_width, planner.batch_mul * hidden
    time, block, final = FREQUENCIES * w + w * w, 5 * w * w, 2 * w * w + w * width
    return {
        "text layers": 2.0 * layers * tokens * (2 * width * width + 2 * width * keys + 3 * width * ffn),
        "attention": 4.0 * layers * width * pairs,
        "lm_head": 2.0 * asked * width * text["vocab_size"],
        "connector": 2.0 * hidden * 3 * width * width,
        "flow head": 2.0 * rows * (width * w + time + planner.flow_depth * block + final) + 2.0 * hidden * width * w,
    }


class Trainee:
    """A planner in training, and its step whole and in parts.

    Args:
        problem: What it trains on.
        recompute: What is recomputed in the backward pass: ``text``, ``flow``, both or nothing.
        optimizer: Whether a step ends with fused AdamW, whose states have the weights' dtype.
        chunk: Rows whose gradients the flow head makes at a time; all if null.
    """

    def __init__(self, problem: TrainProblem, recompute: list[str], optimizer: bool, chunk: int | None = None) -> None:
        self.problem = problem
        self.model = model = problem.shape.build(problem.weights, problem.device).train()
        model.tower.requires_grad_(False)
        model.connector.proj_gen.requires_grad_(False)
        if "text" in recompute:
            model.mllm.gradient_checkpointing_enable({"use_reentrant": False})
        model.vit_decoder.net.gradient_checkpointing = "flow" in recompute
        model.vit_decoder.config.chunk = chunk
        self.pack = pack([problem.sample(number) for number in range(problem.samples)]).to(problem.device)
        self.masked = problem.masked().to(problem.device)
        seen = self.pack.token_type != TEXT
        self.features = torch.randn(int(seen.sum()), problem.shape.text["hidden_size"], device=problem.device)
        self.truth = self.features[self.masked[seen]]
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-5, fused=True) if optimizer else None
        self.condition = torch.randn_like(self.truth).requires_grad_()  # what the flow head alone is given
        self.gradient = torch.randn_like(self.truth)  # what the language model alone is given back

    @property
    def resident(self) -> int:
        """Bytes of weights and optimizer states."""
        states = self.optimizer.state.values() if self.optimizer else ()
        return sum(t.nbytes for t in (*self.model.parameters(), *(v for state in states for v in state.values())))

    def compile(self, backend: str) -> None:
        """Compile the blocks of the flow head, and what a text layer consists of; recomputation stays outside."""
        for layer in self.model.text.layers:
            for part in layer.children():
                part.compile(backend=backend)
        for block in self.model.vit_decoder.net.res_blocks:
            block.compile(backend=backend)

    def step(self) -> float:
        """One training step; the loss."""
        with self._autocast():
            output = self.model(self.pack, self.features, self.masked, self._draw())
            assert output.visual is not None
            loss = output.visual.mean() + NTP * ntp_loss(output)
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
        self._forget()
        return loss.item()

    def flow_head(self) -> None:
        """Forward and backward of the flow head alone, to the condition that it is given."""
        with self._autocast():
            loss = self.model.vit_decoder.loss(self.condition, self.truth, self._draw())
        loss.mean().backward()
        self._forget()

    def language_model(self) -> None:
        """Forward and backward of all the rest, from a gradient of the flow head's condition."""
        with self._autocast():
            output = self.model(self.pack, self.features, self.masked)
            condition = self.model.connector.for_vit(output.hidden[self.masked])
            ntp = NTP * ntp_loss(output)
        torch.autograd.backward([condition, ntp], [self.gradient.to(condition.dtype), None])
        self._forget()

    @torch.no_grad()
    def check(self) -> float:
        """Compare the hidden states of the last sample in the pack with those of the sample alone, under a table.

        Returns:
            Relative L2 error.

        Raises:
            RuntimeError: It is more than bf16 explains: the block mask is not the table.
        """
        model, last = self.model, self.pack.sample == self.pack.sample[-1]
        kind, masked = self.pack.token_type[last], self.masked[last]
        shown = self.features[-int((kind != TEXT).sum()) :]
        with self._autocast():
            packed = model(self.pack, self.features, self.masked).hidden[last]
            embeds = embed_inputs(
                model.embedding, self.pack.ids[last], kind != TEXT, shown, masked, model.mask_tokens[0, 0]
            )
            table = visible(kind, self.pack.segment_id[last])
            alone = run_text(model.text, embeds[None], self.pack.position_ids[:, None, last], table).penultimate[0]
        error = relative_error(packed, alone)
        if not error < ALONE_TOLERANCE:
            raise RuntimeError(f"a sample in the pack is off by {error:.1e} from the same sample alone")
        return error

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.problem.device.type, torch.bfloat16)

    def _draw(self) -> Draws:
        return self.model.vit_decoder.draw(len(self.truth), device=self.problem.device)

    def _forget(self) -> None:
        for tensor in (*self.trainable, self.condition):
            tensor.grad = None


def ntp_loss(output: PlannerOutput) -> Tensor:
    """Mean next-token loss of the labels."""
    return F.cross_entropy(output.logits.float(), output.labels)


def measure_training(
    trainee: Trainee, rounds: int, warmup: int, peak: float, compiler: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Check, then time the whole step, and its two parts by themselves.

    Args:
        trainee: What to time.
        rounds: Timed calls of each.
        warmup: Untimed ones before, at least one.
        peak: TFLOP/s that are 100 % MFU.
        compiler: Backend of ``torch.compile``; null leaves everything as it is.
        say: Prints progress.

    Returns:
        All figures, ready for JSON.

    Raises:
        RuntimeError: A sample is not the same in the pack as alone, or a loss is not finite.
    """
    say(f"a sample in the pack against the same alone: off by {trainee.check():.1e}")
    if compiler is not None:
        trainee.compile(compiler)
    calls = {"step": trainee.step, "language model": trainee.language_model, "flow head": trainee.flow_head}
    began = time.perf_counter()
    losses = [trainee.step()]
    first = time.perf_counter() - began
    losses += [trainee.step() for _ in range(warmup - 1)]
    if not all(loss < float("inf") for loss in losses):
        raise RuntimeError(f"losses are not finite: {losses}")
    for name in ("language model", "flow head"):
        for _ in range(warmup):
            calls[name]()
    say(f"warm, the first step took {first:.1f} s, compilers included, and its loss is {losses[0]:.3f}; timing")
    samples = interleave(calls, rounds, trainee.problem.device)

    parts = forward_flop(trainee.problem.shape, trainee.pack, trainee.masked)
    whole, head = sum(parts.values()), parts["flow head"]
    flop = {"step": whole, "language model": whole - head, "flow head": head}
    table = {
        name: rates(taken, 3 * flop[name], peak)
        | {
            "tflop": 3 * flop[name] / 1e12,
            "peak_gib": (trainee.resident + max(s.memory for s in taken)) / 2**30,
        }
        for name, taken in samples.items()
    }
    medians = {name: row["ms"]["median"] for name, row in table.items()}
    return {
        "hidden": int(trainee.masked.sum()),
        "labels": int((trainee.pack.labels != IGNORED).sum()),
        "parameters": sum(p.numel() for p in trainee.trainable),
        "forward_tflop": {name: value / 1e12 for name, value in parts.items()},
        "calls": table,
        "flow_head_share": medians["flow head"] / medians["step"],
        "noise": noise(samples),
        "first_step_s": first,
    }

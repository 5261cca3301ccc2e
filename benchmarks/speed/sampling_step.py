"""A sampling run with a plan as the released sampler does it, beside ours on the same weights, noise and contexts."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.contestants import Problem, build
from benchmarks.speed.protocol import Sample, interleave, noise, rates, relative_error
from benchmarks.speed.renderer import forward_flop
from bernini.flow.guidance import Context, Omegas, decompose
from bernini.flow.solvers import SOLVERS
from bernini.renderer.experts import Experts
from bernini.renderer.packing import PackedSample, Segment, pack, pad_context, unpatchify
from bernini.renderer.sampling import RenderRequest, SamplingConfig, Source, render
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.text.encoder import MAX_TOKENS

MODE = "vae_txt_vit_wapg"
NEGATIVE, TEXT, PLAN = Context("negative", False), Context("positive", False), Context("positive", True)
FP32_TOLERANCE = 1e-4
# Roundings to bf16 add up over the layers, and guidance weighs their differences up to four times.
BF16_TOLERANCE = 1e-1


@dataclass(frozen=True)
class SamplingProblem(Problem):
    """One edit of a clip with a plan; the source is as large as the target.

    Attributes:
        negative: Rows of the negative context.
        given: Rows of the planner for text and source.
        plan: Rows of the planner for the target.
        steps: Solver steps.
    """

    negative: int = 166
    given: int = 400
    plan: int = 300
    steps: int = 1

    def __str__(self) -> str:
        rows = ", ".join(str(len(context)) for context in self.request.contexts.values())
        return f"{super().__str__()}; as many of a source; {MODE}, contexts of {rows} rows, {self.steps} steps"

    @property
    def config(self) -> SamplingConfig:
        """How clips are edited by the released presets."""
        return SamplingConfig(steps=self.steps, omegas=Omegas(vid=1.25, img=1.25, txt=4.0, tgt=0.5, scale=0.75))

    @property
    def request(self) -> RenderRequest:
        """What is to be made; contexts are filled with zero rows up to 512, as released."""
        positive = self._draw(4, self.text_rows + self.given + self.plan, self.architecture.text_dim)
        rows = {
            NEGATIVE: self._draw(5, self.negative, self.architecture.text_dim),
            TEXT: positive[: self.text_rows + self.given],
            PLAN: positive,
        }
        contexts = {context: pad_context(own, max(MAX_TOKENS, len(own))) for context, own in rows.items()}
        c, t, h, w = self.latent.shape
        return RenderRequest((c, t, h, w), [Source(self.latent, is_video=True)], contexts, MODE, self.seed)

    @property
    def flop(self) -> float:
        """Floating-point operations of a step: one forward without the source, three with it."""
        rows = {context: len(own) for context, own in self.request.contexts.items()}
        alone = forward_flop(self.architecture, self.tokens, rows[NEGATIVE])
        return alone + sum(forward_flop(self.architecture, 2 * self.tokens, own) for own in rows.values())


@torch.no_grad()
def sample_as_released(model: PackedWanTransformer3DModel, request: RenderRequest, config: SamplingConfig) -> Tensor:
    """The released sampler with one expert: in each step a forward for each of four arms, and all of it made anew.

    Args:
        model: The transformer.
        request: With one source clip and a plan.
        config: How to sample; mode, pack sizes and cache are not looked at.

    Returns:
        ``[C, T, H, W]`` fp32 latent.
    """
    solver = SOLVERS[config.solver](config.steps, config.shift)
    omegas, source, x = config.omegas, request.sources[0].latent, request.noise()
    for index, timestep in enumerate(solver.timesteps):
        start = _predict(model, [Segment(x, 0)], request.contexts[NEGATIVE], timestep)
        edited, text, plan = (
            _predict(model, [Segment(source, 1), Segment(x, 0)], request.contexts[context], timestep)
            for context in (NEGATIVE, TEXT, PLAN)
        )
        guided = start
        for weight, better, base in ((omegas.img, edited, start), (omegas.txt, text, edited), (omegas.tgt, plan, text)):
            guided = guided + weight * decompose(better - base, better, (0, 1, 2, 3), parallel=0.2)
        x = solver.step(index, guided, x)
    return x


def _predict(model: PackedWanTransformer3DModel, segments: list[Segment], context: Tensor, timestep: float) -> Tensor:
    packed = pack([PackedSample(segments, context, timestep)], model.patch)
    return unpatchify(model(packed)[packed.target_index].float(), packed.target_grids[0], model.patch)


def contestants(
    problem: SamplingProblem, model: PackedWanTransformer3DModel, compiler: str | None
) -> dict[str, Callable[[], Tensor]]:
    """The released sampler and ours, and both with compiled blocks, all on the same weights.

    Args:
        problem: What they make.
        model: The transformer.
        compiler: Backend of ``torch.compile``; ``None`` leaves the compiled ones out.
    """
    request, config = problem.request, problem.config

    def both(suffix: str, model: PackedWanTransformer3DModel) -> dict[str, Callable[[], Tensor]]:
        experts = Experts(model, boundary=0.0)
        return {
            f"released{suffix}": lambda: sample_as_released(model, request, config),
            f"ours{suffix}": lambda: render(experts, [request], config)[0],
        }

    runs = both("", model)
    if compiler is not None:
        with torch.device("meta"):
            twin = problem.architecture.build()
        twin.load_state_dict(model.state_dict(), assign=True)  # the same memory
        twin.compile_repeated_blocks(backend=compiler)
        runs |= both(" compiled", twin)
    return runs


def check_fp32(problem: SamplingProblem) -> float:
    """Compare ours with the released sampler in fp32 on a cut of the problem: two layers, a small grid, three steps.

    Returns:
        Relative L2 error of the latent.

    Raises:
        RuntimeError: It is above 1e-4.
    """
    small = replace(
        problem,
        architecture=replace(problem.architecture, num_layers=min(2, problem.architecture.num_layers)),
        grid=(min(problem.grid[0], 5), min(problem.grid[1], 6), min(problem.grid[2], 8)),
        dtype=torch.float32,
        steps=3,
    )
    model = build(PackedWanTransformer3DModel, small, None, None)
    released, ours = (run() for run in contestants(small, model, None).values())
    error = relative_error(ours, released)
    if not error < FP32_TOLERANCE:
        raise RuntimeError(f"ours is not the released sampler in fp32: off by {error:.1e}")
    return error


def measure(
    problem: SamplingProblem,
    rounds: int,
    warmup: int,
    compiler: str | None,
    peak: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Check, then time.

    Args:
        problem: What is made.
        rounds: Timed runs of each contestant.
        warmup: Untimed ones before, at least one.
        compiler: Backend of ``torch.compile``, or ``None``.
        peak: TFLOP/s that are 100 % MFU.
        say: Prints progress.

    Returns:
        All figures, ready for JSON.

    Raises:
        RuntimeError: Ours makes another latent than the released sampler.
    """
    off = check_fp32(problem)
    say(f"fp32, ours against the released sampler, 2 layers, 3 steps: off by {off:.1e}")
    model = build(PackedWanTransformer3DModel, problem, None, None)
    runs = contestants(problem, model, compiler)
    latents: dict[str, Tensor] = {}
    for name, run in runs.items():
        latents[name] = [run() for _ in range(warmup)][-1]
        say(f"{name}: warm")
    errors = {name: relative_error(latent, latents["released"]) for name, latent in latents.items()}
    if not max(errors.values()) < BF16_TOLERANCE:
        raise RuntimeError(f"another latent than the released sampler's: {errors}")

    resident = sum(p.nbytes for p in model.parameters())
    samples = interleave(runs, rounds, problem.device)
    table = {
        name: {
            **_per_step(problem, taken, peak),
            "peak_gib": (resident + max(s.memory for s in taken)) / 2**30,
            "beyond_weights_gib": max(s.memory for s in taken) / 2**30,
            "error": errors[name],
        }
        for name, taken in samples.items()
    }
    ours = [name for name in runs if name.startswith("ours")]
    seconds = {name: row["seconds"]["median"] for name, row in table.items()}
    ratios = {name: seconds[name] / seconds[name.replace("ours", "released")] for name in ours}
    figures = {"fp32": off, "contestants": table, "noise": noise(samples), "peak_tflops": peak}
    return figures | {"ratios": ratios, "ratio": min(seconds[name] for name in ours) / seconds["released"]}


def _per_step(problem: SamplingProblem, taken: Sequence[Sample], peak: float) -> dict[str, Any]:
    """Seconds of a step, and what they come to."""
    figures = rates(taken, problem.steps * problem.flop, peak)
    seconds = {name: ms / 1e3 / problem.steps for name, ms in figures.pop("ms").items()}
    return {"seconds": seconds, **figures}


def facts(problem: SamplingProblem) -> dict[str, Any]:
    """The problem as JSON takes it."""
    rows = [len(context) for context in problem.request.contexts.values()]
    return problem.facts() | {"mode": MODE, "context_rows": rows, "omegas": asdict(problem.config.omegas)}

"""Rendering: from sources and text to a latent, with any guidance mode, solver and number of experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from bernini.errors import ConfigError
from bernini.flow.guidance import APG, Arm, Context, Guide, Omegas, Sources, check_mode, get_mode
from bernini.flow.noise import add_noise
from bernini.flow.solvers import SOLVERS, SolverName
from bernini.renderer.experts import Experts
from bernini.renderer.packing import PackedSample, Segment, interpolate_ids
from bernini.renderer.stage import Stage
from bernini.stacking import by_shape

BeyondTrained = Literal["interpolate", "extend"]


def source_ids(count: int, beyond_trained: BeyondTrained) -> list[float]:
    """Ids of ``count`` sources: 1, 2, 3, ..., and for more than five as ``SamplingConfig.beyond_trained`` says."""
    return interpolate_ids(count) if beyond_trained == "interpolate" else [float(i + 1) for i in range(count)]


@dataclass
class SamplingConfig:
    """How clips are sampled; the defaults are the released renderer's.

    Attributes:
        steps: Solver steps.
        shift: Flow-matching shift of the sigma grid.
        solver: ``unipc`` or ``euler``.
        mode: Guidance mode; each task's own if null.
        omegas: Guidance weights.
        apg: Projection in the space of clean latents, of the ``*_apg`` modes.
        frames: Length of clips that no source gives a size, 4k + 1.
        height: Their height in pixels.
        width: Their width in pixels.
        seed: Seed of the noise; sample ``i`` of a run uses ``seed + i``.
        negative_prompt: Text of the negative arms; it gets no task sentence.
        max_pack: Most samples in one forward; arms of several clips share a pack.
        max_tokens: Most tokens in one forward. Large samples gain nothing from company; a larger one goes alone.
        cache: Make keys and values of text and plan once per expert instead of in every step. The numbers are the same;
            a row takes twice the width of the transformer in each block.
        beyond_trained: Ids of more sources than the five that were trained: ``interpolate`` squeezes all of them into
            1..5, ``extend`` goes on with 6, 7, ...
    """

    steps: int = 40
    shift: float = 5.0
    solver: SolverName = "unipc"
    mode: str | None = None
    omegas: Omegas = field(default_factory=Omegas)
    apg: APG = field(default_factory=APG)
    frames: int = 81
    height: int = 480
    width: int = 848
    seed: int = 42
    negative_prompt: str = ""
    max_pack: int = 64
    max_tokens: int = 32768
    cache: bool = True
    beyond_trained: BeyondTrained = "interpolate"

    def __post_init__(self) -> None:
        for name in ("steps", "max_pack", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sampling.{name} must be at least 1")
        if self.mode is not None:
            check_mode(self.mode)


@dataclass
class Source:
    """A conditioning latent.

    Attributes:
        latent: ``[C, T, H, W]`` normalised.
        is_video: Whether it came from a clip rather than an image.
    """

    latent: Tensor
    is_video: bool


@dataclass
class RenderRequest:
    """One clip to be made.

    Attributes:
        shape: ``(C, T, H, W)`` of the latent.
        sources: Conditions, in the order in which they are numbered.
        contexts: ``[rows, text_dim]`` for every context that the mode reads. Those without a plan are always there; one
            with a plan makes it a request of the full model, whose modes are others.
        mode: Guidance mode.
        seed: Seed of the noise.
        truth: ``[C, T, H, W]`` the true latent; needed only to start below pure noise.
    """

    shape: tuple[int, int, int, int]
    sources: list[Source]
    contexts: dict[Context, Tensor]
    mode: str
    seed: int
    truth: Tensor | None = None

    @property
    def planned(self) -> bool:
        """Whether there is a plan."""
        return any(context.plan for context in self.contexts)

    def noise(self) -> Tensor:
        """Initial noise, drawn on the CPU so that a seed means the same everywhere."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        device = next(iter(self.contexts.values())).device
        return torch.randn((1, *self.shape), generator=generator)[0].to(device)

    def segments(self, sources: Sources, beyond_trained: BeyondTrained = "interpolate") -> list[Segment]:
        """Conditions that an arm sees, with their source ids.

        Clips are numbered before images; a subset of both keeps the ids of the whole, images alone have their own.
        """
        videos = [s for s in self.sources if s.is_video]
        images = [s for s in self.sources if not s.is_video]
        if sources == "none":
            chosen: list[Source] = []
        elif sources == "images":
            chosen = images
        else:
            chosen = videos + images
        ids = source_ids(len(chosen), beyond_trained)
        if sources == "first_video":
            chosen = videos[:1]
        return [Segment(s.latent, i) for s, i in zip(chosen, ids, strict=False)]


@dataclass
class _Trajectory:
    """A request on its way from noise to a clip."""

    request: RenderRequest
    guide: Guide
    x: Tensor
    beyond_trained: BeyondTrained
    velocities: dict[Arm, Tensor] = field(default_factory=dict)

    def sample(self, arm: Arm) -> PackedSample:
        """What the model sees of an arm."""
        segments = [*self.request.segments(arm.sources, self.beyond_trained), Segment(self.x, 0)]
        return PackedSample(segments, self.request.contexts[arm.context], timestep=0)


@dataclass
class Step:
    """A step that was made.

    Attributes:
        done: Steps that are made.
        total: Steps in all.
        timestep: Timestep (0..1000) that the model was given.
        latents: ``[C, T, H, W]`` fp32 of each request after the step; sampling goes on from what is left here.
        stop: Set it to make no more steps.
    """

    done: int
    total: int
    timestep: int
    latents: list[Tensor]
    stop: bool = False


OnStep = Callable[[Step], None]


@torch.no_grad()
def render(
    experts: Experts,
    requests: Sequence[RenderRequest],
    config: SamplingConfig,
    on_step: OnStep | None = None,
) -> list[Tensor]:
    """Sample latents.

    With both experts, or a single one, a trajectory runs from noise to data. A lone high-noise expert stops at the
    boundary and gives its estimate of the clean latent; a lone low-noise expert starts there from the noised truth.

    Args:
        experts: The transformers.
        requests: Clips to be made; they share the solver's grid, nothing else.
        config: Solver, weights and pack size.
        on_step: Called after every step.

    Returns:
        ``[C, T, H, W]`` fp32 latent per request.

    Raises:
        ConfigError: A lone low-noise expert was given no truth to start from, or a mode needs a plan and there is none,
            or has no use for the one that there is.
    """
    grid = SOLVERS[config.solver](config.steps, config.shift)
    first, last = _window(experts, grid.timesteps)
    trajectories = [_start(r, config, first, grid.sigmas[first]) for r in requests]
    alike = [[trajectories[place] for place in places] for places in by_shape(one.x for one in trajectories)]
    solvers = [SOLVERS[config.solver](config.steps, config.shift, first) for _ in alike]
    for low, own in groupby(range(first, last), lambda index: experts.is_low(grid.timesteps[index])):
        steps = list(own)
        model = experts.at(grid.timesteps[steps[0]])
        jobs = [(one, arm) for one in trajectories for arm in one.guide.arms(low)]
        samples = [one.sample(arm) for one, arm in jobs]
        stage = Stage(model, samples, config.max_pack, config.max_tokens, config.cache)
        for index in steps:
            sigma = grid.sigmas[index]
            found = stage.predict([one.x for one, _ in jobs], grid.timesteps[index])
            for (one, arm), velocity in zip(jobs, found, strict=True):
                one.velocities[arm] = velocity
            stop_early = index == last - 1 and last < config.steps
            for some, solver in zip(alike, solvers, strict=True):
                x = torch.stack([one.x for one in some])
                velocity = torch.stack([one.guide.combine(one.velocities, one.x, sigma, low) for one in some])
                x = x - sigma * velocity if stop_early else solver.step(index, velocity, x)
                for one, latent in zip(some, x, strict=True):
                    one.x = latent
            if on_step:
                step = Step(index + 1 - first, last - first, grid.timesteps[index], [one.x for one in trajectories])
                on_step(step)
                for one, x in zip(trajectories, step.latents, strict=True):
                    one.x = x
                if step.stop:
                    return step.latents
        del stage  # and all that it keeps, before the other expert's is made
    return [one.x for one in trajectories]


def _window(experts: Experts, timesteps: list[int]) -> tuple[int, int]:
    """First and one past the last step that the experts at hand can make."""
    switch = next((i for i, t in enumerate(timesteps) if experts.is_low(t)), len(timesteps))
    first = 0 if experts.transformer is not None else switch
    last = len(timesteps) if experts.transformer_2 is not None else switch
    if first >= last:
        raise ConfigError(
            f"none of the {len(timesteps)} steps lies on this expert's side of sigma {experts.boundary}",
            fix="raise sampling.steps",
        )
    return first, last


def _start(request: RenderRequest, config: SamplingConfig, first: int, sigma: float) -> _Trajectory:
    x = request.noise()
    if first > 0:
        if request.truth is None:
            raise ConfigError(
                "the low-noise expert cannot start from pure noise",
                fix="load both experts, or sample clips whose target is known",
            )
        x = add_noise(request.truth.float(), x, sigma)

    def seen(arm: Arm) -> tuple:
        segments = request.segments(arm.sources, config.beyond_trained)
        return arm.context, tuple((id(s.latent), s.source_id) for s in segments)

    mode = get_mode(request.mode, request.planned).merged(seen)
    return _Trajectory(request, Guide(mode, config.omegas, config.apg), x, config.beyond_trained)

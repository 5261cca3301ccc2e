"""Guidance as data: a mode is a start arm and a list of weighted differences between arms, plus how they are projected.

An arm is one way of conditioning the model: which sources it sees, which text, and whether the plan. Every mode is then

    guided = e(start) + sum_i weight_i * P(e(arm_i) - e(base_i); e(arm_i))

with ``P`` the identity, where arms may cancel out and are then not run, or a projection that damps the component
parallel to ``e(arm_i)``, of velocities or of predictions of the clean latent.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from bernini.errors import ConfigError

Sources = Literal["none", "first_video", "images", "all"]
Text = Literal["negative", "positive"]


class Context(NamedTuple):
    """What cross-attention reads.

    Attributes:
        text: The text that was asked for, or the negative one.
        plan: Whether the plan's target tokens follow it. A planner's rows for its own text and source tokens are there
            either way; without a planner it is text alone, and there are no contexts with a plan.

    The released names are ``wotxt_wovit`` (negative, no plan), ``wtxt_wovit``, ``wotxt_wvit`` and ``wtxt_wvit``
    (positive, plan).
    """

    text: Text
    plan: bool


@dataclass(frozen=True)
class Arm:
    """What the model is given: sources, text and plan."""

    sources: Sources
    text: Text
    plan: bool = False

    @property
    def context(self) -> Context:
        """What it reads besides sources."""
        return Context(self.text, self.plan)


@dataclass(frozen=True)
class Term:
    """One weighted difference.

    Attributes:
        arm: The better conditioned arm.
        base: The arm it is compared with.
        weight: Which omega scales it.
    """

    arm: Arm
    base: Arm
    weight: Literal["vid", "img", "txt", "tgt"]


@dataclass(frozen=True)
class Projection:
    """How differences are projected.

    Attributes:
        space: ``clean`` is adaptive projected guidance between predictions of the clean latent, as :class:`APG` says;
            ``velocity`` decomposes differences of velocities over the whole sample.
        eta: Share of the component parallel to the better prediction that is kept; that of :class:`APG` if null.
    """

    space: Literal["clean", "velocity"]
    eta: float | None = None


@dataclass(frozen=True)
class Mode:
    """A guidance mode.

    Attributes:
        start: Arm whose prediction the terms are added to.
        terms: Weighted differences.
        projection: How differences are projected, if at all.
    """

    start: Arm
    terms: tuple[Term, ...]
    projection: Projection | None = None

    def shares(self, omegas: "Omegas") -> dict[Arm, float]:
        """What each arm counts for where differences are not projected; arms that cancel out are left out."""
        shares = {self.start: 1.0}
        for term in self.terms:
            weight = getattr(omegas, term.weight)
            shares[term.arm] = shares.get(term.arm, 0.0) + weight
            shares[term.base] = shares.get(term.base, 0.0) - weight
        return {arm: share for arm, share in shares.items() if share}

    def arms(self, omegas: "Omegas") -> list[Arm]:
        """Distinct arms that have to be run; those without influence need not."""
        if not self.projection:
            return list(self.shares(omegas))
        used = [a for t in self.terms if getattr(omegas, t.weight) for a in (t.base, t.arm)]
        return list(dict.fromkeys([self.start, *used]))

    def merged(self, seen: Callable[[Arm], Hashable]) -> "Mode":
        """The mode with one name for all arms that show the model the same.

        Args:
            seen: What an arm shows the model.
        """
        names: dict[Hashable, Arm] = {}
        start = names.setdefault(seen(self.start), self.start)
        terms = [
            Term(names.setdefault(seen(t.arm), t.arm), names.setdefault(seen(t.base), t.base), t.weight)
            for t in self.terms
        ]
        return replace(self, start=start, terms=tuple(t for t in terms if t.arm != t.base))


def _n(sources: Sources) -> Arm:
    return Arm(sources, "negative")


def _p(sources: Sources) -> Arm:
    return Arm(sources, "positive")


def _planned(sources: Sources) -> Arm:
    return Arm(sources, "positive", plan=True)


_CLEAN = Projection("clean")
_VELOCITY = Projection("velocity", eta=0.2)


def _text_only(sources: Sources, projection: Projection | None = None) -> Mode:
    return Mode(_n(sources), (Term(_p(sources), _n(sources), "txt"),), projection)


MODES: dict[str, Mode] = {
    "t2v": _text_only("none"),
    "t2v_apg": _text_only("none", _CLEAN),
    "v2v": _text_only("all"),
    "v2v_apg": _text_only("all", _CLEAN),
    "v2v_chain": Mode(
        _n("none"),
        (Term(_n("first_video"), _n("none"), "vid"), Term(_p("all"), _n("first_video"), "txt")),
    ),
    "r2v_apg": Mode(
        _n("none"),
        (Term(_n("images"), _n("none"), "img"), Term(_p("images"), _n("images"), "txt")),
        _CLEAN,
    ),
    "rv2v": Mode(
        _n("none"),
        (
            Term(_n("first_video"), _n("none"), "vid"),
            Term(_n("all"), _n("first_video"), "img"),
            Term(_p("all"), _n("all"), "txt"),
        ),
    ),
}
"""Modes of a renderer alone, as released."""

_TEXT_THEN_PLAN = (Term(_p("all"), _n("all"), "txt"), Term(_planned("all"), _p("all"), "tgt"))
_SOURCES_AT_ONCE = (Term(_n("all"), _n("none"), "img"), *_TEXT_THEN_PLAN)
_VIDEO_THEN_IMAGES = (
    Term(_n("first_video"), _n("none"), "vid"),
    Term(_n("all"), _n("first_video"), "img"),
    *_TEXT_THEN_PLAN,
)

PLANNED_MODES: dict[str, Mode] = {
    "vae_txt_vit": Mode(_n("none"), _SOURCES_AT_ONCE),
    "vae_txt_vit_wapg": Mode(_n("none"), _SOURCES_AT_ONCE, _VELOCITY),
    "rv2v_wapg": Mode(_n("none"), _VIDEO_THEN_IMAGES),
    "rv2v_projected": Mode(_n("none"), _VIDEO_THEN_IMAGES, _VELOCITY),
    "v2v_apg": Mode(_n("none"), (Term(_planned("all"), _n("none"), "txt"),), Projection("clean", eta=1.0)),
}
"""Modes with a plan, as released: in ``rv2v_wapg`` nothing is projected, whatever its name says. ``rv2v_projected``
is ours, and what that was meant to be. ``v2v_apg`` is not the one above."""


def check_mode(name: str) -> None:
    """Refuse a name that no mode has, with or without a plan.

    Raises:
        ConfigError: No mode has that name.
    """
    names = list(dict.fromkeys([*MODES, *PLANNED_MODES]))
    if name not in names:
        near = get_close_matches(name, names, 1)
        raise ConfigError(
            f"unknown guidance mode {name!r}",
            why=f"the modes are {', '.join(MODES)}, and with a planner {', '.join(PLANNED_MODES)}",
            fix=f"did you mean {near[0]!r}?" if near else "",
        )


def get_mode(name: str, planned: bool) -> Mode:
    """Look a guidance mode up.

    Args:
        name: One of :data:`MODES` or :data:`PLANNED_MODES`.
        planned: Whether there is a plan; ``v2v_apg`` means something else then.

    Raises:
        ConfigError: No mode has that name, or it needs a plan and there is none, or the reverse.
    """
    check_mode(name)
    modes = PLANNED_MODES if planned else MODES
    if name not in modes:
        raise ConfigError(
            f"guidance mode {name!r} {'has no use for a plan' if planned else 'needs a plan'}",
            why=f"the modes {'with' if planned else 'without'} a planner are {', '.join(modes)}",
            fix="set sampling.mode to one of them, or to null for the task's own",
        )
    return modes[name]


@dataclass(frozen=True)
class Omegas:
    """Guidance weights.

    Attributes:
        vid: Weight of source clips.
        img: Weight of reference images.
        txt: Weight of the text.
        tgt: Weight of the plan.
        scale: Factor on all of them once the low-noise expert has taken over.
    """

    vid: float = 1.25
    img: float = 4.5
    txt: float = 4.0
    tgt: float = 0.5
    scale: float = 0.8

    def scaled(self) -> "Omegas":
        """The weights after the switch of experts."""
        weights = {name: getattr(self, name) * self.scale for name in ("vid", "img", "txt", "tgt")}
        return replace(self, **weights)


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (arXiv 2410.02416), norms taken per latent frame.

    Attributes:
        eta: Share of the component parallel to the prediction that is kept.
        threshold: Largest norm of a difference per latent frame.
        momentum: Weight of the running difference of earlier steps.
    """

    eta: float = 0.5
    threshold: float = 50.0
    momentum: float = 0.0

    def project(self, difference: Tensor, reference: Tensor) -> Tensor:
        """Clip a difference and damp its component along the reference.

        Args:
            difference: ``[C, T, H, W]`` difference of two predictions of the clean latent.
            reference: ``[C, T, H, W]`` the better conditioned of the two.
        """
        dims = (0, 2, 3)
        norm = vector_norm(difference, dim=dims, keepdim=True)
        difference = difference * (self.threshold / norm).clamp(max=1)
        return decompose(difference, reference, dims, parallel=self.eta)


def decompose(
    difference: Tensor, reference: Tensor, dims: tuple[int, ...], parallel: float, orthogonal: float = 1.0
) -> Tensor:
    """Weigh the components of a difference parallel and orthogonal to a reference, in float64.

    Args:
        difference: Any shape.
        reference: The same shape.
        dims: Dimensions that make up one vector.
        parallel: Weight of the parallel component.
        orthogonal: Weight of the orthogonal component.
    """
    d, r = difference.double(), reference.double()
    r = r / vector_norm(r, dim=dims, keepdim=True).clamp(min=1e-12)
    along = (d * r).sum(dims, keepdim=True) * r
    return (orthogonal * (d - along) + parallel * along).to(difference.dtype)


class Guide:
    """Combines the predictions of a mode's arms, step after step of one trajectory.

    Args:
        mode: Which arms, and how they combine.
        omegas: Weights.
        apg: Settings of projections in the space of clean latents.
    """

    def __init__(self, mode: Mode, omegas: Omegas, apg: APG) -> None:
        self.mode, self.omegas, self.apg = mode, omegas, apg
        if mode.projection and mode.projection.eta is not None:
            self.apg = replace(apg, eta=mode.projection.eta)
        self._running: dict[Term, Tensor] = {}

    def arms(self, low: bool) -> list[Arm]:
        """Arms to run at this step.

        Args:
            low: Whether the low-noise expert runs it.
        """
        return self.mode.arms(self._weights(low))

    def _weights(self, low: bool) -> Omegas:
        return self.omegas.scaled() if low else self.omegas

    def combine(self, velocities: dict[Arm, Tensor], x: Tensor, sigma: float, low: bool) -> Tensor:
        """The guided velocity.

        Args:
            velocities: ``[C, T, H, W]`` per arm.
            x: ``[C, T, H, W]`` noised latent.
            sigma: Its noise level.
            low: Whether the low-noise expert made the predictions.
        """
        weights, projection = self._weights(low), self.mode.projection
        if projection is None:
            parts = (share * velocities[arm] for arm, share in self.mode.shares(weights).items())
            return sum(parts, start=torch.zeros_like(x))
        if projection.space == "velocity":
            return self._add_terms(velocities, weights)
        clean = {arm: x - sigma * velocity for arm, velocity in velocities.items()}
        return (x - self._add_terms(clean, weights)) / sigma

    def _add_terms(self, predictions: dict[Arm, Tensor], weights: Omegas) -> Tensor:
        """The start arm's prediction and the projected differences."""
        guided = predictions[self.mode.start]
        for term in self.mode.terms:
            if weight := getattr(weights, term.weight):
                difference = predictions[term.arm] - predictions[term.base]
                guided = guided + weight * self._project(term, difference, predictions[term.arm])
        return guided

    def _project(self, term: Term, difference: Tensor, reference: Tensor) -> Tensor:
        assert self.mode.projection is not None
        if self.mode.projection.space == "velocity":
            return decompose(difference, reference, (0, 1, 2, 3), parallel=self.apg.eta)
        return self.apg.project(self._accelerate(term, difference), reference)

    def _accelerate(self, term: Term, difference: Tensor) -> Tensor:
        if self.apg.momentum:
            difference = difference + self.apg.momentum * self._running.get(term, torch.zeros_like(difference))
            self._running[term] = difference
        return difference

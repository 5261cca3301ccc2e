"""Guidance as data: a mode is a start arm and a list of weighted differences between arms, plus how they are projected.

An arm is one way of conditioning the model: which sources it sees and which text. Every mode is then

    guided = e(start) + sum_i weight_i * P(e(arm_i) - e(base_i); e(arm_i))

with ``P`` the identity in velocity space, where arms may cancel out and are then not run, or adaptive projected
guidance (APG) in the space of clean latents.
"""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from bernini.errors import ConfigError

Sources = Literal["none", "first_video", "images", "all"]
Text = Literal["negative", "positive"]


@dataclass(frozen=True)
class Arm:
    """What the model is given: sources and text."""

    sources: Sources
    text: Text


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
    weight: Literal["vid", "img", "txt"]


@dataclass(frozen=True)
class Mode:
    """A guidance mode.

    Attributes:
        start: Arm whose prediction the terms are added to.
        terms: Weighted differences.
        apg: Whether differences are projected in the space of clean latents.
    """

    start: Arm
    terms: tuple[Term, ...]
    apg: bool = False

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
        if not self.apg:
            return list(self.shares(omegas))
        used = [a for t in self.terms if getattr(omegas, t.weight) for a in (t.base, t.arm)]
        return list(dict.fromkeys([self.start, *used]))


def _n(sources: Sources) -> Arm:
    return Arm(sources, "negative")


def _p(sources: Sources) -> Arm:
    return Arm(sources, "positive")


def _text_only(sources: Sources, apg: bool = False) -> Mode:
    return Mode(_n(sources), (Term(_p(sources), _n(sources), "txt"),), apg)


MODES: dict[str, Mode] = {
    "t2v": _text_only("none"),
    "t2v_apg": _text_only("none", apg=True),
    "v2v": _text_only("all"),
    "v2v_apg": _text_only("all", apg=True),
    "v2v_chain": Mode(
        _n("none"),
        (Term(_n("first_video"), _n("none"), "vid"), Term(_p("all"), _n("first_video"), "txt")),
    ),
    "r2v_apg": Mode(
        _n("none"),
        (Term(_n("images"), _n("none"), "img"), Term(_p("images"), _n("images"), "txt")),
        apg=True,
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
"""Renderer-only modes of the released sampler."""


def get_mode(name: str) -> Mode:
    """Look a guidance mode up.

    Raises:
        ConfigError: No mode has that name.
    """
    if name not in MODES:
        near = get_close_matches(name, MODES, 1)
        raise ConfigError(
            f"unknown guidance mode {name!r}",
            why=f"the modes are {', '.join(MODES)}",
            fix=f"did you mean {near[0]!r}?" if near else "",
        )
    return MODES[name]


@dataclass(frozen=True)
class Omegas:
    """Guidance weights.

    Attributes:
        vid: Weight of source clips.
        img: Weight of reference images.
        txt: Weight of the text.
        scale: Factor on all of them once the low-noise expert has taken over.
    """

    vid: float = 1.25
    img: float = 4.5
    txt: float = 4.0
    scale: float = 0.8

    def scaled(self) -> "Omegas":
        """The weights after the switch of experts."""
        return replace(self, vid=self.vid * self.scale, img=self.img * self.scale, txt=self.txt * self.scale)


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
        apg: Projection of the modes that ask for it.
    """

    def __init__(self, mode: Mode, omegas: Omegas, apg: APG) -> None:
        self.mode, self.omegas, self.apg = mode, omegas, apg
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
        weights = self._weights(low)
        if not self.mode.apg:
            parts = (share * velocities[arm] for arm, share in self.mode.shares(weights).items())
            return sum(parts, start=torch.zeros_like(x))
        predictions = {a: x - sigma * v for a, v in velocities.items()}
        guided = predictions[self.mode.start]
        for term in self.mode.terms:
            if weight := getattr(weights, term.weight):
                difference = self._accelerate(term, predictions[term.arm] - predictions[term.base])
                guided = guided + weight * self.apg.project(difference, predictions[term.arm])
        return (x - guided) / sigma

    def _accelerate(self, term: Term, difference: Tensor) -> Tensor:
        if self.apg.momentum:
            difference = difference + self.apg.momentum * self._running.get(term, torch.zeros_like(difference))
            self._running[term] = difference
        return difference

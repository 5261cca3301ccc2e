"""What ranks have counted between two points of a log, and the figures that it comes to."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from callbacks.timeline import SECTIONS

GIB = 2**30
MOST_RANKS = 16  # of more, only the largest and the least peak of memory are told
LEGS = (("optimizer",), ("data", "forward"))
"""Sections between places where ranks meet: after the backward pass, and where Lightning looks for a signal to stop."""


@dataclass(frozen=True)
class Counted:
    """What one rank has counted.

    Attributes:
        samples: Samples.
        steps: Optimizer steps.
        flop: Model FLOPs (`bernini.flop`).
        compiled: Graphs that were compiled.
        memory: Bytes of device memory at the worst moment of the run; 0 on a CPU.
        packs: Packs that a renderer was given.
        renderer_tokens: Tokens in them.
        renderer_targets: Those of them that are targets.
        planner_tokens: Tokens that a planner was given.
        planner_targets: Those of them that it had to plan.
        data: Seconds of waiting for batches.
        forward: Seconds of forward passes.
        backward: Seconds of backward passes.
        optimizer: Seconds of clipping gradients and of the optimizer.
        rest: Seconds of all else, but for validation.
    """

    samples: float
    steps: float
    flop: float
    compiled: float
    memory: float
    packs: float
    renderer_tokens: float
    renderer_targets: float
    planner_tokens: float
    planner_targets: float
    data: float
    forward: float
    backward: float
    optimizer: float
    rest: float

    @property
    def seconds(self) -> float:
        """Seconds of training."""
        return sum(self.section(name) for name in SECTIONS)

    def section(self, name: str) -> float:
        """Seconds of a section."""
        return float(getattr(self, name))


def summarize(ranks: Sequence[Counted], copies: float, peak: float | None, budget: int | None) -> dict[str, float]:
    """Figures of all ranks together, by their names in the log.

    Args:
        ranks: What each rank has counted.
        copies: Ranks that see the same data, and share its work.
        peak: TFLOP/s of one device that are 100 % MFU; null leaves MFU out.
        budget: Tokens that a pack takes; null where batches have no such bound.
    """
    seconds, steps = max(rank.seconds for rank in ranks), max(1.0, ranks[0].steps)

    def rate(name: str) -> float:
        return _sum(ranks, name) / copies / seconds

    figures = {
        "samples_per_s": rate("samples"),
        "step_s": seconds / steps,
        "tflops": rate("flop") / len(ranks) / 1e12,
        "data_wait": _sum(ranks, "data") / sum(rank.seconds for rank in ranks),
        "compiles": max(rank.compiled for rank in ranks),
    }
    if peak and figures["tflops"]:
        figures["mfu"] = figures["tflops"] / peak
    for part in ("renderer", "planner"):
        if _sum(ranks, f"{part}_tokens"):
            figures[f"{part}/tokens_per_s"] = rate(f"{part}_tokens")
            figures[f"{part}/target_tokens_per_s"] = rate(f"{part}_targets")
    if budget and (packs := _sum(ranks, "packs")):
        figures["padding"] = 1 - _sum(ranks, "renderer_tokens") / (packs * budget)
    figures |= {f"time/{name}_s": _sum(ranks, name) / len(ranks) / steps for name in SECTIONS}
    figures |= _memory([rank.memory / GIB for rank in ranks])
    return {f"speed/{name}": value for name, value in figures.items()}


def slowest(ranks: Sequence[Counted]) -> tuple[int, str, float]:
    """The rank that others wait for.

    Early ranks wait for the last one wherever they meet, so that all steps take equally long. Who comes last is told by
    what passes before they meet: in it, the rank that is furthest behind the mean of the others. What happens between
    batches (``rest``) ends with a meeting itself, and tells nothing.

    Returns:
        The rank, the section that holds it up most, and by how many seconds it is behind.
    """
    found = []
    for leg in LEGS:
        behind = {name: _behind([rank.section(name) for rank in ranks]) for name in leg}
        for number in range(len(ranks)):
            so_far = accumulate(behind[name][number] for name in leg)
            found += [(late, number, leg[: at + 1], behind) for at, late in enumerate(so_far)]
    late, number, passed, behind = max(found, key=lambda one: one[0])
    return number, max(passed, key=lambda name: behind[name][number]), late


def _behind(seconds: Sequence[float]) -> list[float]:
    """How much longer each rank takes than the others do on average."""
    return [own - (sum(seconds) - own) / (len(seconds) - 1) for own in seconds]


def _sum(ranks: Sequence[Counted], name: str) -> float:
    return sum(float(getattr(rank, name)) for rank in ranks)


def _memory(peaks: list[float]) -> dict[str, float]:
    if not any(peaks):
        return {}
    figures = {"peak_gib": max(peaks)}
    if 1 < len(peaks) <= MOST_RANKS:
        figures |= {f"peak_gib_rank_{rank}": peak for rank, peak in enumerate(peaks)}
    elif len(peaks) > 1:
        figures["peak_gib_least"] = min(peaks)
    return figures

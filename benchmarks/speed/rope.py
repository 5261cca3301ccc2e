"""Norm and SA-3D RoPE of queries and keys beside four rivals, in one process: `python -m benchmarks.speed.rope`.

Rivals are written here from their definitions: the released code's complex128 rotation, diffusers' cosines and sines,
the same compiled, and torch's fused norm before a Triton rotary kernel. All are given random bfloat16 rows and their
tables ready made. Every one is compared with float64 before anything is timed. Each time is of several calls in a row.
A share is that of the run's own copy bandwidth which reading and writing q and k once would take.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.environment import environment
from benchmarks.speed.command import add_timing, open_device, refuse_below_one, run_command, stopwatch, write_json
from benchmarks.speed.protocol import Sample, Timing, ceilings, clocks, interleave, noise, relative_error
from bernini.rope.op import Segments, choose_kernel, prepare_segments, sa3d_qk_norm_rope
from bernini.rope.reference import rotate, sa3d_angles

HEAD_DIM, EPS = 128, 1e-6
SHAPES = {
    "14b-32760": (40, (21, 30, 52)),
    "14b-75600": (40, (21, 45, 80)),
    "1.3b-32760": (12, (21, 30, 52)),
    "tiny": (2, (4, 8, 8)),
}
"""Heads, and the grid of the clip in patches."""
OURS = "ours"
# Roundings to bf16 fall differently in every implementation: ours may be this much further off than the best rival is.
BF16_SLACK = 1.05

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
Rival = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """Rows to be normed and rotated.

    Attributes:
        heads: Heads of 128.
        table: ``[n, 5]`` segments.
        rows: q, k ``[tokens, heads, 128]`` and their weights ``[heads * 128]``, bfloat16.
        grads: Gradients of the outputs.
    """

    heads: int
    table: Tensor
    rows: Rows
    grads: tuple[Tensor, Tensor]

    @classmethod
    def draw(cls, heads: int, grids: Sequence[tuple[int, int, int]], device: torch.device) -> "Problem":
        """Random rows over segments of some grids, which are numbered 1, 2, ..., and the last one 0."""
        table, start = [], 0
        for number, grid in enumerate(grids, 1):
            table.append((start, *grid, number % len(grids)))
            start += math.prod(grid)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16)

        shape, width = (start, heads, HEAD_DIM), heads * HEAD_DIM
        rows = (random(*shape), random(*shape), 1 + random(width) / 4, 1 + random(width) / 4)
        return cls(
            heads, torch.tensor(table, dtype=torch.float32, device=device), rows, (random(*shape), random(*shape))
        )

    @property
    def tokens(self) -> int:
        """Number of rows."""
        return len(self.rows[0])

    def bytes(self, passes: int) -> int:
        """Bytes of so many passes over q and k."""
        return passes * 2 * self.rows[0].nbytes

    def forward(self, rival: Rival) -> Callable[[], object]:
        """A call of the rival."""
        return lambda: rival(*self.rows)

    def both(self, rival: Rival) -> Callable[[], object]:
        """A call of the rival and of its backward pass, weights included."""
        leaves = [x.detach().requires_grad_() for x in self.rows]

        def call() -> list[Tensor]:
            return [*(out := rival(*leaves)), *torch.autograd.grad(out, leaves, self.grads)]

        return call

    def backward(self, rival: Rival) -> Callable[[], object]:
        """The rival's backward pass alone."""
        leaves = [x.detach().requires_grad_() for x in self.rows]
        out = rival(*leaves)
        return lambda: torch.autograd.grad(out, leaves, self.grads, retain_graph=True)

    def segments(self) -> Segments:
        """The op's view of the table."""
        return prepare_segments(self.table, self.tokens, HEAD_DIM)

    def exact(self) -> list[Tensor]:
        """Outputs and gradients in float64."""
        q, k, *weights = leaves = [x.double().requires_grad_() for x in self.rows]
        angles = sa3d_angles(self.table.double(), self.tokens, HEAD_DIM)

        def one(x: Tensor, weight: Tensor) -> Tensor:
            flat = x.flatten(1)
            normed = flat * torch.rsqrt(flat.square().mean(1, keepdim=True) + EPS) * weight
            return rotate(normed.view_as(x), angles.cos(), angles.sin())

        out = one(q, weights[0]), one(k, weights[1])
        grads = torch.autograd.grad(out, leaves, [x.double() for x in self.grads])
        return [*(x.detach() for x in out), *grads]


def rivals(problem: Problem, backend: str) -> dict[str, Rival]:
    """All contestants, ours last."""
    angles = sa3d_angles(problem.table, problem.tokens, HEAD_DIM)
    complex_table = torch.polar(torch.ones_like(angles), angles)[:, None]
    cos, sin = angles.cos().float(), angles.sin().float()
    cos_twice, sin_twice = (x.repeat_interleave(2, 1)[:, None] for x in (cos, sin))

    def both(one: Callable[[Tensor, Tensor], Tensor]) -> Rival:
        return lambda q, k, weight_q, weight_k: (one(q, weight_q), one(k, weight_k))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.flatten(1), weight.shape, weight, EPS).view_as(x)

    def wan_norm(x: Tensor, weight: Tensor) -> Tensor:
        flat = x.flatten(1).float()
        return ((flat * torch.rsqrt(flat.square().mean(1, keepdim=True) + EPS)).to(x.dtype) * weight).view_as(x)

    def released(x: Tensor, weight: Tensor) -> Tensor:
        pairs = torch.view_as_complex(wan_norm(x, weight).double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * complex_table).flatten(-2).to(x.dtype)

    def stock(x: Tensor, weight: Tensor) -> Tensor:
        even, odd = norm(x, weight).unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos_twice[..., 0::2], sin_twice[..., 1::2]
        out = torch.empty_like(x)
        out[..., 0::2] = even * c - odd * s
        out[..., 1::2] = even * s + odd * c
        return out

    def two_kernels(x: Tensor, weight: Tensor) -> Tensor:
        from benchmarks.speed.rotary import triton_rotary  # there is no Triton without a GPU

        return triton_rotary(norm(x, weight), cos, sin)

    named = {"released complex128": both(released), "diffusers": both(stock)}
    named["diffusers compiled"] = torch.compile(named["diffusers"], backend=backend)
    if problem.table.is_cuda:
        named["norm + triton rotary"] = both(two_kernels)
    op = partial(sa3d_qk_norm_rope, segments=problem.segments(), eps=EPS)
    named[OURS] = op
    if problem.segments().kernel == "fused":
        named[f"{OURS}, saving outputs"] = partial(op, save_outputs=True)
    return named


def check(problem: Problem, backend: str) -> dict[str, dict[str, float]]:
    """Compare all contestants with float64.

    Returns:
        Relative L2 error of outputs and gradients by contestant.

    Raises:
        RuntimeError: Ours is further from float64 than the best rival is, by more than rounding explains.
    """
    truth, errors = problem.exact(), {}
    for name, rival in rivals(problem, backend).items():
        found = problem.both(rival)()
        assert isinstance(found, list)
        pairs = zip(("q", "k", "dq", "dk", "dweight_q", "dweight_k"), found, truth, strict=True)
        errors[name] = {part: relative_error(mine, right) for part, mine, right in pairs}
    for part, mine in errors[OURS].items():
        best = min(own[part] for name, own in errors.items() if not name.startswith(OURS))
        if not mine <= BF16_SLACK * best:
            raise RuntimeError(f"{part} of ours is off by {mine:.2e}, and that of a rival by {best:.2e}")
    return errors


def irregular(tokens: int) -> list[tuple[int, int, int]]:
    """64 grids of different kinds, images, clips and single rows, which have so many tokens together."""
    kinds = [(1, 16, 16), (5, 6, 10), (1, 30, 52), (3, 9, 16), (1, 1, 77)]
    grids = [kinds[i % len(kinds)] for i in range(63)]
    while sum(map(math.prod, grids)) >= tokens:
        largest = max(range(63), key=lambda i: math.prod(grids[i]))
        grids[largest] = (1, 1, 1)
    return [*grids, (1, 1, tokens - sum(map(math.prod, grids)))]


def measure(name: str, args: argparse.Namespace, device: torch.device, copy: float) -> dict[str, Any]:
    """Time all contestants on one shape."""
    heads, grid = SHAPES[name]
    problem = Problem.draw(heads, [grid], device)
    every = rivals(problem, args.backend)
    calls = {f"{who}|forward": problem.forward(rival) for who, rival in every.items()}
    calls |= {f"{who}|both": problem.both(rival) for who, rival in every.items()}
    calls |= {f"{who}|backward": problem.backward(rival) for who, rival in every.items() if who.startswith(OURS)}
    many = Problem(problem.heads, Problem.draw(1, irregular(problem.tokens), device).table, problem.rows, problem.grads)
    op = partial(sa3d_qk_norm_rope, segments=many.segments(), eps=EPS)
    calls |= {"64 segments|forward": many.forward(op), "64 segments|both": many.both(op)}
    for call in calls.values():
        for _ in range(args.warmup):
            call()
    samples = interleave(calls, args.rounds, device, args.repeats)
    floors = {
        kind: problem.bytes(passes) / copy / 1e9 for kind, passes in (("forward", 2), ("backward", 3), ("both", 5))
    }

    def row(taken: list[Sample], kind: str) -> dict[str, Any]:
        timing = Timing.of(s.ms for s in taken)
        return {"ms": asdict(timing), "share": floors[kind] / timing.median}

    table: dict[str, dict[str, Any]] = {}
    for key, taken in samples.items():
        who, kind = key.split("|")
        table.setdefault(who, {})[kind] = row(taken, kind)
    ours = table[OURS]
    return {
        "tokens": problem.tokens,
        "heads": heads,
        "kernel": problem.segments().kernel,
        "contestants": table,
        "noise": noise(samples),
        "speedup": {who: own["both"]["ms"]["median"] / ours["both"]["ms"]["median"] for who, own in table.items()},
        "segments": {k: table["64 segments"][k]["ms"]["median"] / ours[k]["ms"]["median"] for k in ("forward", "both")},
    }


def run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Check, then time. Prints as it goes.

    Returns:
        All figures, ready for JSON.
    """
    say, facts = stopwatch(), environment()
    say(f"{facts['gpu'] if device.type == 'cuda' else facts['processor']}; torch {torch.__version__}; {clocks(device)}")
    say(f"the op runs as: {choose_kernel(device, HEAD_DIM)}")
    limits = ceilings(device)
    say(f"ceilings: {limits}")
    small = Problem.draw(SHAPES[args.shapes[0]][0], [(1, 7, 9), (2, 3, 300), (1, 1, 1), (5, 12, 20)], device)
    errors = check(small, args.backend)
    for name, own in errors.items():
        say(f"{name}: off from float64: " + ", ".join(f"{part} {error:.2e}" for part, error in own.items()))
    shapes = {}
    for name in args.shapes:
        shapes[name] = measure(name, args, device, limits.copy)
        _print(name, shapes[name])
    say(f"done; {clocks(device)}")
    return {"environment": facts, "ceilings": asdict(limits), "errors": errors, "shapes": shapes}


def _print(name: str, figures: dict[str, Any]) -> None:
    def cells(row: dict[str, Any]) -> str:
        return f"{row['ms']['median']:11.3f}{row['share']:9.1%}"

    title = f"{name}, {figures['kernel']}"
    print(f"\n{title:26}{'forward ms':>11}{'of copy':>9}{'both ms':>11}{'of copy':>9}{'x ours':>8}")
    for who, own in figures["contestants"].items():
        print(f"{who:26}{cells(own['forward'])}{cells(own['both'])}{figures['speedup'][who]:8.2f}")
        if "backward" in own:
            print(f"{'  its backward alone':46}{cells(own['backward'])}")
    told = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in figures["segments"].items())
    print(
        f"64 irregular segments over a dense one: {told}; rounds of one call differ by {figures['noise']:.1%}",
        flush=True,
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.rope", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=default, help="(default: all but tiny)")
    add_timing(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark from command-line arguments and return its figures.

    Raises:
        ConfigError: A device that is not there, or a number below 1.
    """
    args = _parse(arguments)
    device = open_device(args.device, "--device cpu --shapes tiny --rounds 2")
    refuse_below_one({name: getattr(args, name) for name in ("rounds", "repeats", "warmup")})
    figures = run(args, device)
    write_json(figures, args.json)
    return figures


if __name__ == "__main__":
    run_command(main)

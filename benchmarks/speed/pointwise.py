"""A block's pointwise work, eager and compiled, in one process: `python -m benchmarks.speed.pointwise`.

LayerNorm with adaLN's scale and shift, and the residual with its gate, as the renderer calls them: bf16 rows, fp32
modulation of one sample. Results are compared with float64 before anything is timed. The floor of a pass is its rows
read and written once, at the bandwidth of a copy in the same run.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.environment import environment
from benchmarks.speed.command import add_timing, open_device, refuse_below_one, run_command, stopwatch, write_json
from benchmarks.speed.protocol import Timing, ceilings, clocks, interleave, noise, relative_error
from bernini.renderer.pointwise import gated_residual, modulated_norm

EPS = 1e-6
SHAPES = {"14b-32760": (32_760, 5120), "1.3b-32760": (32_760, 1536), "tiny": (48, 32)}
"""Tokens and width."""
# Roundings to bf16 fall alike: both round fp32 once. What is left is the order of sums.
SLACK = 1.02

Function = Callable[..., Tensor]
Way = Callable[[Function], Function]
"""What is made of a function before it is called: nothing, or a compiled one."""


@dataclass(frozen=True)
class Task:
    """One function with its arguments.

    Attributes:
        name: For the table.
        function: The renderer's, of the arguments.
        exact: The same in float64.
        rows: Arguments ``[tokens, dim]``.
        modulation: Arguments ``[dim]``, fp32.
        grad: Gradient of the result.
        passes: How many tensors like ``rows`` a forward, and a backward, has to read or write.
    """

    name: str
    function: Function
    exact: Function
    rows: tuple[Tensor, ...]
    modulation: tuple[Tensor, ...]
    grad: Tensor
    passes: tuple[int, int]

    def forward(self, way: Way) -> Callable[[], object]:
        """A call."""
        function, arguments = way(self.function), (*self.rows, *self.modulation)
        return lambda: function(*arguments)

    def both(self, way: Way) -> Callable[[], list[Tensor]]:
        """A call and its backward pass, modulation included."""
        return self._both(way(self.function), (*self.rows, *self.modulation), self.grad)

    def truth(self) -> list[Tensor]:
        """Result and gradients in float64."""
        return self._both(self.exact, [x.double() for x in (*self.rows, *self.modulation)], self.grad.double())()

    @staticmethod
    def _both(function: Function, arguments: Sequence[Tensor], grad: Tensor) -> Callable[[], list[Tensor]]:
        leaves = [x.detach().requires_grad_() for x in arguments]

        def call() -> list[Tensor]:
            out = function(*leaves)
            return [out, *torch.autograd.grad(out, leaves, grad)]

        return call


def as_it_is(function: Function) -> Function:
    """The function itself."""
    return function


def tasks(tokens: int, dim: int, device: torch.device) -> list[Task]:
    """Both functions on random rows."""
    x, y, grad = torch.randn(3, tokens, dim, device=device).bfloat16()
    scale, shift, gate = torch.randn(3, dim, device=device)

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + EPS) * (1 + scale) + shift

    def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulated_norm(x, scale, shift, EPS)

    return [
        Task("modulated norm", modulated, norm, (x,), (scale, shift), grad, (2, 3)),
        Task("gated residual", gated_residual, lambda x, y, g: x + y * g, (x, y), (gate,), grad, (3, 4)),
    ]


def check(task: Task, ways: dict[str, Way]) -> dict[str, float]:
    """Compare with float64.

    Returns:
        The largest relative L2 error among the result and its gradients, by way.

    Raises:
        RuntimeError: Something compiled is further from float64 than it is uncompiled.
    """
    truth, errors = task.truth(), {}
    for name, way in ways.items():
        errors[name] = [relative_error(mine, right) for mine, right in zip(task.both(way)(), truth, strict=True)]
    for mine, eager in zip(errors["compiled"], errors["eager"], strict=True):
        if not mine <= SLACK * eager + 1e-6:
            raise RuntimeError(f"{task.name}, compiled, is off by {mine:.2e}, and eager by {eager:.2e}")
    return {name: max(own) for name, own in errors.items()}


def measure(name: str, args: argparse.Namespace, device: torch.device, copy: float) -> dict[str, Any]:
    """Check both functions on one shape, then time them, each eager and compiled."""
    torch.compiler.reset()  # each shape is compiled for itself
    ways: dict[str, Way] = {"eager": as_it_is, "compiled": partial(torch.compile, backend=args.backend)}
    every = tasks(*SHAPES[name], device)
    errors = {task.name: check(task, ways) for task in every}
    calls: dict[str, Callable[[], object]] = {}
    floors: dict[str, float] = {}
    for task in every:
        forward, backward = (n * task.grad.nbytes / copy / 1e9 for n in task.passes)
        floors |= {f"{task.name}|forward": forward, f"{task.name}|both": forward + backward}
        for way, make in ways.items():
            calls[f"{task.name}|forward|{way}"] = task.forward(make)
            calls[f"{task.name}|both|{way}"] = task.both(make)
    for call in calls.values():
        for _ in range(args.warmup):
            call()
    samples = interleave(calls, args.rounds, device, args.repeats)
    table: dict[str, dict[str, Any]] = {}
    for key, taken in samples.items():
        what, _, way = key.rpartition("|")
        timing = Timing.of(s.ms for s in taken)
        memory = max(s.memory for s in taken) / 2**20
        own = {"ms": asdict(timing), "share": floors[what] / timing.median, "peak_mib": memory}
        table.setdefault(what, {})[way] = own
    tokens, dim = every[0].grad.shape
    return {"tokens": tokens, "dim": dim, "errors": errors, "noise": noise(samples), "functions": table}


def run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure all shapes. Prints as it goes.

    Returns:
        All figures, ready for JSON.
    """
    say, facts = stopwatch(), environment()
    say(f"{facts['gpu'] if device.type == 'cuda' else facts['processor']}; torch {torch.__version__}; {clocks(device)}")
    limits = ceilings(device)
    say(f"ceilings: {limits}")
    shapes = {}
    for name in args.shapes:
        shapes[name] = measure(name, args, device, limits.copy)
        _print(name, shapes[name])
    say(f"done; {clocks(device)}")
    return {"environment": facts, "ceilings": asdict(limits), "shapes": shapes}


def _print(name: str, figures: dict[str, Any]) -> None:
    print(f"\n{name:26}{'eager ms':>11}{'of copy':>9}{'compiled':>11}{'of copy':>9}{'x faster':>10}")
    for what, own in figures["functions"].items():
        cells = "".join(f"{own[way]['ms']['median']:11.3f}{own[way]['share']:9.1%}" for way in ("eager", "compiled"))
        faster = own["eager"]["ms"]["median"] / own["compiled"]["ms"]["median"]
        print(f"{what.replace('|', ', '):26}{cells}{faster:10.2f}")
    told = "; ".join(
        f"{task} " + ", ".join(f"{way} {error:.2e}" for way, error in own.items())
        for task, own in figures["errors"].items()
    )
    print(f"off from float64: {told}; rounds of one call differ by {figures['noise']:.1%}", flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.pointwise",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
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

"""A sampling step with a plan, ours beside the released arms, in one process: `python -m benchmarks.speed.sampling`.

A clip is edited in the mode `vae_txt_vit_wapg`: one arm without the source and three with it, under three contexts
that are filled up to 512 rows. The released way runs each arm by itself and makes all of it anew, with this package's
blocks and attention; ours is `render`. Both are also run with compiled blocks if asked to. Latents are compared before
anything is timed. In a run of one step, the default, ours pays in full for the keys and values that it keeps.

The defaults, one expert of Wan 2.2 A14B in bf16 with random weights and 32,760 target tokens, are made for a device of
141 GB.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.quality.environment import environment
from benchmarks.speed.command import add_shared, open_device, refuse_below_one, run_command, stopwatch, write_json
from benchmarks.speed.protocol import PEAK_TFLOPS, ceilings, clocks
from benchmarks.speed.renderer import MODELS
from benchmarks.speed.sampling_step import SamplingProblem, facts, measure


def run(problem: SamplingProblem, args: argparse.Namespace) -> dict[str, Any]:
    """Check, then time. Prints as it goes; a table last.

    Args:
        problem: What is made.
        args: The command line.

    Returns:
        All figures, ready for JSON.
    """
    say, machine, device = stopwatch(), environment(), problem.device
    name = machine["gpu"] if device.type == "cuda" else machine["processor"]
    say(f"{name}; torch {torch.__version__}; {clocks(device)}")
    limits = ceilings(device)
    say(f"ceilings: {limits}")
    say(f"problem: {problem}")
    compiler = args.backend if args.compile else None
    figures = measure(problem, args.rounds, args.warmup, compiler, args.peak_tflops, say)
    say(f"done; {clocks(device)}")
    _print_table(figures)
    return {
        "environment": machine,
        "problem": facts(problem),
        "ceilings": asdict(limits),
        "compiler": compiler,
        **figures,
    }


def _print_table(figures: dict[str, Any]) -> None:
    print(f"\n{'':20}{'s a step':>10}{'min':>10}{'max':>10}{'MFU':>8}{'peak GiB':>10}{'+ weights':>11}{'off':>10}")
    for name, row in figures["contestants"].items():
        seconds = row["seconds"]
        print(
            f"{name:20}{seconds['median']:10.3f}{seconds['fastest']:10.3f}{seconds['slowest']:10.3f}{row['mfu']:8.1%}"
            f"{row['peak_gib']:10.2f}{row['beyond_weights_gib']:11.2f}{row['error']:10.1e}"
        )
    print(
        f"ours takes {figures['ratio']:.3f} of the released arms' time; rounds of one contestant differ by "
        f"{figures['noise']:.1%}\n'+ weights' is memory beyond them; 'off' is from the released arms; MFU of "
        f"{figures['peak_tflops']:.0f} TFLOP/s"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.sampling", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="14b", help="shape of the transformer (default: 14b)")
    parser.add_argument("--layers", type=int, help="number of blocks, if not all of the model's")
    parser.add_argument(
        "--grid", type=int, nargs=3, default=(21, 30, 52), metavar=("T", "H", "W"),
        help="patches of target and source (default: 21 30 52, which is 32,760 tokens)",
    )  # fmt: skip
    parser.add_argument("--text", type=int, default=100, help="rows of text features (default: 100)")
    parser.add_argument("--given", type=int, default=400, help="planner's rows of text and source (default: 400)")
    parser.add_argument("--plan", type=int, default=300, help="planner's rows of the target (default: 300)")
    parser.add_argument("--negative", type=int, default=166, help="rows of the negative context (default: 166)")
    parser.add_argument("--steps", type=int, default=1, help="steps of a run, whose time they share (default: 1)")
    parser.add_argument("--rounds", type=int, default=2, help="timed runs of each (default: 2)")
    parser.add_argument("--warmup", type=int, default=1, help="untimed runs of each (default: 1)")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks")
    parser.add_argument("--peak-tflops", type=float, default=PEAK_TFLOPS, help="100 %% MFU (default: 989, an H100)")
    add_shared(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark from command-line arguments and return its figures.

    Raises:
        ConfigError: A device that is not there, or a number below 1.
    """
    args = _parse(arguments)
    device = open_device(args.device, "--device cpu --model tiny --grid 2 4 4")
    names = ("text", "given", "plan", "negative", "steps", "rounds", "warmup")
    counts = {name: getattr(args, name) for name in names}
    counts |= {"layers": args.layers if args.layers is not None else 1, "grid": min(args.grid)}
    refuse_below_one(counts)
    shape = MODELS[args.model]
    problem = SamplingProblem(
        architecture=replace(shape, num_layers=args.layers or shape.num_layers),
        grid=tuple(args.grid),
        text_rows=args.text,
        dtype=torch.bfloat16,
        device=device,
        negative=args.negative,
        given=args.given,
        plan=args.plan,
        steps=args.steps,
    )
    figures = run(problem, args)
    write_json(figures, args.json)
    return figures


if __name__ == "__main__":
    run_command(main)

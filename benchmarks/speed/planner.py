"""Speed of the planner, in two measurements of one process each, with random weights made on the device.

`python -m benchmarks.speed.planner plan`: masked planning with the prefix cache and CUDA graphs beside the released
loop, which runs three streams whole in every step. Results are compared before anything is timed. The defaults are
Qwen2.5-VL-7B and 300 target tokens, which are made for a device of 80 GB.

`python -m benchmarks.speed.planner train`: a training step of the same cut to eight layers, with the whole flow head,
on 16,384 packed tokens: forward and backward in bf16 autocast, with `--optimizer` fused AdamW. It is timed whole and as
its two parts, language model and flow head, which makes its gradients in chunks of rows. Nothing is recomputed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.quality.environment import environment
from benchmarks.speed.command import open_device, refuse_below_one, run_command, stopwatch, write_json
from benchmarks.speed.planner_plan import PlanProblem, measure_plans
from benchmarks.speed.planner_shapes import SHAPES
from benchmarks.speed.planner_train import Trainee, TrainProblem, measure_training
from benchmarks.speed.protocol import PEAK_TFLOPS, ceilings, clocks
from bernini.errors import ConfigError
from bernini.planner.flow_head import CHUNK
from bernini.planner.planning import PlanningConfig

WEIGHTS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Check, then time. Prints as it goes; a table last.

    Args:
        args: The command line.
        device: Where to run.

    Returns:
        All figures, ready for JSON.
    """
    say, facts = stopwatch(), environment()
    say(
        f"{facts['gpu'] if device.type == 'cuda' else facts['processor']}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {clocks(device)}"
    )
    limits = ceilings(device)
    say(f"ceilings: {limits}")
    shape = SHAPES[args.model].cut(args.layers)
    sizes = {"shape": shape, "target": args.target, "text": args.text, "sources": args.sources, "device": device}
    problem: PlanProblem | TrainProblem
    if args.measurement == "plan":
        config = PlanningConfig(args.steps, args.flow_steps, args.txt, args.img)
        problem = PlanProblem(**sizes, negative=args.negative, config=config, dtype=torch.bfloat16)
        say(f"problem: {problem}")
        figures = measure_plans(problem, args.rounds, args.warmup, say)
    else:
        problem = TrainProblem(**sizes, samples=args.samples, labels=args.labels, weights=WEIGHTS[args.weights])
        say(f"problem: {problem}")
        trainee = Trainee(problem, args.recompute, args.optimizer, args.chunk)
        compiler = args.backend if args.compile else None
        figures = measure_training(trainee, args.rounds, args.warmup, args.peak_tflops, compiler, say)
        figures |= {"recompute": args.recompute, "chunk": args.chunk, "optimizer": args.optimizer}
        figures |= {"compiler": compiler, "peak_tflops": args.peak_tflops}
    say(f"done; {clocks(device)}")
    (_print_plans if args.measurement == "plan" else _print_training)(figures)
    return {"environment": facts, "problem": problem.facts(), "ceilings": asdict(limits), **figures}


def _print_plans(figures: dict[str, Any]) -> None:
    print(
        f"\n{'':18}{'plan ms':>10}{'min':>10}{'max':>10}{'peak GiB':>10}{'+ weights':>11}{'off fp32':>10}{'cosine':>9}"
    )
    for name, row in figures["contestants"].items():
        ms = row["ms"]
        print(
            f"{name:18}{ms['median']:10.1f}{ms['fastest']:10.1f}{ms['slowest']:10.1f}{row['peak_gib']:10.2f}"
            f"{row['beyond_weights_gib']:11.2f}{row['error']:10.1e}{row['cosine']:9.5f}"
        )
    speedups = ", ".join(f"{name} 1/{x:.2f}" for name, x in list(figures["speedup"].items())[1:])
    print(
        f"of the released loop's time: {speedups}; rounds of one contestant differ by {figures['noise']:.1%}\n"
        "'+ weights' is memory beyond the weights, in ours without what its recording keeps; cosine is with the "
        "released loop's plan"
    )


def _print_training(figures: dict[str, Any]) -> None:
    print(f"\n{'':18}{'ms':>10}{'min':>10}{'max':>10}{'TFLOP':>10}{'MFU':>8}{'peak GiB':>10}")
    for name, row in figures["calls"].items():
        ms = row["ms"]
        print(
            f"{name:18}{ms['median']:10.1f}{ms['fastest']:10.1f}{ms['slowest']:10.1f}{row['tflop']:10.4g}"
            f"{row['mfu']:8.1%}{row['peak_gib']:10.2f}"
        )
    parts = ", ".join(f"{name} {value:.4g}" for name, value in figures["forward_tflop"].items())
    print(
        f"the flow head takes {figures['flow_head_share']:.1%} of the step, {figures['hidden']} hidden tokens; "
        f"rounds of one call differ by {figures['noise']:.1%}\nforward TFLOP: {parts}\n"
        f"MFU of {figures['peak_tflops']:.0f} TFLOP/s; a step counts three forward passes, attention the pairs that see"
        " each other; recomputation is not counted"
    )


def _shared(rounds: int, warmup: int) -> argparse.ArgumentParser:
    """What both measurements are asked."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", choices=SHAPES, default="7b", help="shape of the planner (default: 7b)")
    shared.add_argument("--target", type=int, default=300, help="target tokens (default: 300)")
    shared.add_argument("--sources", type=int, default=600, help="source tokens (default: 600)")
    shared.add_argument("--rounds", type=int, default=rounds, help=f"timed calls of each (default: {rounds})")
    shared.add_argument("--warmup", type=int, default=warmup, help=f"untimed calls of each (default: {warmup})")
    shared.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    shared.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    return shared


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.planner", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="measurement", required=True)
    plan = commands.add_parser("plan", parents=[_shared(5, 1)], help="masked planning beside the released loop")
    plan.add_argument("--layers", type=int, help="text layers, if not all of the model's")
    plan.add_argument("--text", type=int, default=100, help="tokens of the prompt (default: 100)")
    plan.add_argument("--negative", type=int, default=40, help="tokens of the negative prompt (default: 40)")
    plan.add_argument("--steps", type=int, default=25, help="planning steps (default: 25)")
    plan.add_argument("--flow-steps", type=int, default=5, help="steps of the flow head (default: 5)")
    plan.add_argument("--txt", type=float, default=1.2, help="guidance from imgcond to cond (default: 1.2)")
    plan.add_argument("--img", type=float, default=1.0, help="guidance from uncond to imgcond (default: 1.0)")

    train = commands.add_parser("train", parents=[_shared(10, 3)], help="a training step")
    train.add_argument("--layers", type=int, default=8, help="text layers (default: 8)")
    train.add_argument("--text", type=int, default=124, help="text tokens of a sample (default: 124)")
    train.add_argument("--samples", type=int, default=16, help="samples of the pack (default: 16)")
    train.add_argument("--labels", type=int, default=60, help="labels of every fifth sample (default: 60)")
    train.add_argument("--weights", choices=WEIGHTS, default="bf16", help="dtype of the weights (default: bf16)")
    train.add_argument(
        "--recompute", choices=("text", "flow"), nargs="*", default=[],
        help="what is recomputed in the backward pass (default: nothing)",
    )  # fmt: skip
    train.add_argument(
        "--chunk", type=int, default=CHUNK,
        help=f"rows whose gradients the flow head makes at a time, if it has more (default: {CHUNK})",
    )  # fmt: skip
    train.add_argument("--optimizer", action="store_true", help="end a step with fused AdamW")
    train.add_argument("--compile", action="store_true", help="compile text layers and blocks of the flow head")
    train.add_argument("--backend", default="inductor", help="what torch.compile compiles with (default: inductor)")
    train.add_argument("--peak-tflops", type=float, default=PEAK_TFLOPS, help="100 %% MFU (default: 989, an H100)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run a measurement from command-line arguments and return its figures.

    Raises:
        ConfigError: A device that is not there, a number below 1, or more labels than there is text to label.
    """
    args = _parse(arguments)
    device = open_device(args.device, "--device cpu --model tiny")
    counted = ("target", "sources", "text", "rounds", "warmup", "layers", "negative", "samples", "labels", "chunk")
    refuse_below_one({name: value for name in counted if (value := getattr(args, name, None)) is not None})
    if args.measurement == "train" and args.labels > args.text // 2:
        raise ConfigError(f"--labels is {args.labels}", why="half of the text can be labelled", fix="give more --text")
    figures = run(args, device)
    write_json(figures, args.json)
    return figures


if __name__ == "__main__":
    run_command(main)

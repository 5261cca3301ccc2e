"""Speed of the data.

`python -m benchmarks.speed.data decode`: a clip is decoded and resized as a loader's worker does, by its own process,
beside PyAV with nothing around it and the same resize, on one core. Pixels are compared before anything is timed.

`read`: prepared samples of 81 frames at 480p, with text features, are read by one process out of the page cache.

`wait`: a renderer trains on such samples as `bernini fit` has it, and each step's wait for its batch is timed. The
default, the 1.3B shape, takes some 35 GB of device memory.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.environment import environment
from benchmarks.speed import data_decode
from benchmarks.speed.command import open_device, refuse_below_one, run_command, stopwatch, write_json
from benchmarks.speed.data_prepared import Shape, measure_reading, measure_waiting, write_samples
from benchmarks.speed.renderer import MODELS


def decode(args: argparse.Namespace) -> dict[str, Any]:
    """Time decoding. Prints as it goes; a table last."""
    refuse_below_one({"frames": args.frames, "size": min(args.size), "max-edge": args.max_edge, "warmup": args.warmup})
    machine, say = environment(), stopwatch()
    say(f"{machine['processor']}; PyAV {machine['av']}; torch {torch.__version__}")
    figures = data_decode.measure(args.frames, tuple(args.size), args.max_edge, args.rounds, args.warmup, say)
    print(f"\n{'':20}{'ms a clip':>12}{'min':>10}{'max':>10}{'frames/s':>10}{'of bare':>10}")
    for name, row in figures["contestants"].items():
        ms = row["ms"]
        print(
            f"{name:20}{ms['median']:12.1f}{ms['fastest']:10.1f}{ms['slowest']:10.1f}{row['frames_per_second']:10.1f}"
            f"{row['of_bare']:10.1%}"
        )
    print(f"rounds of one contestant differ by {figures['noise']:.1%}")
    return {"environment": machine, **figures}


def read(args: argparse.Namespace) -> dict[str, Any]:
    """Time reading. Prints as it goes; the rate last."""
    refuse_below_one({"samples": args.samples})
    machine, say = environment(), stopwatch()
    say(f"{machine['processor']}; torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        write_samples(Path(folder), args.samples, Shape(tuple(args.latent), args.text_rows, 4096))
        figures = measure_reading(Path(folder), args.rounds, say)
    ms = figures["ms"]
    rates = [figures["bytes"] / ms[name] / 1e3 for name in ("slowest", "fastest")]
    print(f"{figures['mb_per_second']:.0f} MB/s ({rates[0]:.0f} .. {rates[1]:.0f}) by one process")
    return {"environment": machine, **figures}


def wait(args: argparse.Namespace) -> dict[str, Any]:
    """Time a training run. Prints as it goes; the wait last."""
    device = open_device(args.device, "wait --device cpu --model tiny --latent 3 4 4 --text-rows 8 --rounds 3")
    refuse_below_one({"samples": args.samples})
    machine, say, architecture = environment(), stopwatch(), MODELS[args.model]
    say(f"{machine['gpu'] if device.type == 'cuda' else machine['processor']}; torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        write_samples(Path(folder), args.samples, Shape(tuple(args.latent), args.text_rows, architecture.text_dim))
        figures = measure_waiting(
            Path(folder), architecture, device, args.workers, args.rounds, args.warmup, args.compile, say
        )
    step, waited = figures["step_ms"], figures["wait_ms"]
    print(f"{step['median']:.1f} ms a step ({step['fastest']:.1f} .. {step['slowest']:.1f})")
    print(f"{waited['median']:.2f} ms of it waiting ({waited['fastest']:.2f} .. {waited['slowest']:.2f})")
    print(f"{figures['wait']:.2%} of all steps is waiting for data")
    return {"environment": machine, "model": args.model, **figures}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.data", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="measurement", required=True)
    first = commands.add_parser("decode", help="decoding and resizing beside bare PyAV")
    first.add_argument("--frames", type=int, default=81, help="frames of the clip, 4k + 1 (default: 81)")
    first.add_argument(
        "--size", type=int, nargs=2, default=(480, 848), metavar=("H", "W"), help="of the clip (default: 480 848)"
    )
    first.add_argument("--max-edge", type=int, default=448, help="longest edge after resizing (default: 448)")
    first.add_argument("--warmup", type=int, default=2, help="untimed calls of each (default: 2)")
    second = commands.add_parser("read", help="prepared samples by one process")
    third = commands.add_parser("wait", help="the wait of a training step for prepared samples")
    for command in (second, third):
        command.add_argument("--samples", type=int, default=32, help="that are written (default: 32)")
        command.add_argument(
            "--latent", type=int, nargs=3, default=(21, 60, 104), metavar=("T", "H", "W"), help="(default: 21 60 104)"
        )
        command.add_argument("--text-rows", type=int, default=512, help="of text features (default: 512)")
    third.add_argument("--model", choices=sorted(MODELS), default="1.3b", help="shape of the renderer (default: 1.3b)")
    third.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    third.add_argument("--workers", type=int, default=4, help="processes that read (default: 4)")
    third.add_argument("--warmup", type=int, default=3, help="untimed steps (default: 3)")
    third.add_argument("--compile", action="store_true", help="compile the blocks")
    for command, function, what in ((first, decode, "calls of each"), (second, read, "passes"), (third, wait, "steps")):
        command.add_argument("--rounds", type=int, default=20, help=f"timed {what} (default: 20)")
        command.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
        command.set_defaults(run=function)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run a measurement from command-line arguments and return its figures.

    Raises:
        ConfigError: A number is below 1, or the device is not there.
    """
    args = _parse(arguments)
    refuse_below_one({"rounds": args.rounds})
    figures: dict[str, Any] = args.run(args)
    write_json(figures, args.json)
    return figures


if __name__ == "__main__":
    run_command(main)

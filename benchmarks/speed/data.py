"""Speed of the data, on one core.

`python -m benchmarks.speed.data decode`: a clip is decoded and resized as a loader's worker does, by its own process,
beside PyAV with nothing around it and the same resize. Pixels are compared before anything is timed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.environment import environment
from benchmarks.speed.command import refuse_below_one, run_command, stopwatch, write_json
from benchmarks.speed.data_decode import measure


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure. Prints as it goes; a table last.

    Args:
        args: The command line.

    Returns:
        All figures, ready for JSON.
    """
    say, machine = stopwatch(), environment()
    say(f"{machine['processor']}; PyAV {machine['av']}; torch {torch.__version__}")
    figures = measure(args.frames, tuple(args.size), args.max_edge, args.rounds, args.warmup, say)
    print(f"\n{'':20}{'ms a clip':>12}{'min':>10}{'max':>10}{'frames/s':>10}{'of bare':>10}")
    for name, row in figures["contestants"].items():
        ms = row["ms"]
        print(
            f"{name:20}{ms['median']:12.1f}{ms['fastest']:10.1f}{ms['slowest']:10.1f}{row['frames_per_second']:10.1f}"
            f"{row['of_bare']:10.1%}"
        )
    print(f"rounds of one contestant differ by {figures['noise']:.1%}")
    return {"environment": machine, **figures}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.data", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="measurement", required=True)
    decode = commands.add_parser("decode", help="decoding and resizing beside bare PyAV")
    decode.add_argument("--frames", type=int, default=81, help="frames of the clip, 4k + 1 (default: 81)")
    decode.add_argument(
        "--size", type=int, nargs=2, default=(480, 848), metavar=("H", "W"), help="of the clip (default: 480 848)"
    )
    decode.add_argument("--max-edge", type=int, default=448, help="longest edge after resizing (default: 448)")
    decode.add_argument("--rounds", type=int, default=20, help="timed calls of each (default: 20)")
    decode.add_argument("--warmup", type=int, default=2, help="untimed calls of each (default: 2)")
    decode.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run a measurement from command-line arguments and return its figures.

    Raises:
        ConfigError: A number is below 1.
    """
    args = _parse(arguments)
    counts = {"frames": args.frames, "size": min(args.size), "rounds": args.rounds}
    refuse_below_one({**counts, "max-edge": args.max_edge, "warmup": args.warmup})
    figures = run(args)
    write_json(figures, args.json)
    return figures


if __name__ == "__main__":
    run_command(main)

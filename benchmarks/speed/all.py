"""The speed benchmarks one after the other, and one table of them all: `python -m benchmarks.speed.all`.

Each runs in a process of its own, so that none finds the memory that another has left, and writes its figures into a
folder. Those that fail are named at the end; the others are run all the same.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.command import run_command
from bernini.errors import BerniniError

CPU = "--device cpu --warmup 1"
TINY = f"{CPU} --model tiny"
COMMANDS = {
    "rope": ("rope", f"{CPU} --shapes tiny --rounds 1 --repeats 1 --backend aot_eager"),
    "pointwise": ("pointwise", f"{CPU} --shapes tiny --rounds 1 --repeats 1 --backend aot_eager"),
    "renderer": (
        "renderer",
        f"{TINY} --grid 2 4 4 --text-rows 8 --steps 1 --forwards 1 --backend aot_eager",
    ),
    "sampling": ("sampling", f"{TINY} --grid 2 4 4 --text 6 --given 8 --plan 6 --negative 5 --rounds 1"),
    "packs": (
        "packs",
        f"{TINY} --max-frames 17 --max-area 4096 --tokens 200 --samples 200 --ranks 2 --steps 1 --no-compile",
    ),
    "small": ("small --recompute offload --cap 24 --variants swap fp8-swap", f"{TINY} --steps 1"),
    "plan": (
        "planner plan",
        f"{TINY} --target 12 --sources 20 --text 8 --negative 5 --steps 4 --rounds 1",
    ),
    "planner": (
        "planner train --optimizer",
        f"{TINY} --target 6 --sources 9 --text 8 --labels 3 --samples 6 --rounds 1",
    ),
    "data": ("data wait", f"{TINY} --latent 3 4 4 --text-rows 8 --rounds 3 --workers 0"),
}
"""Arguments of each benchmark, and those of a small run on a CPU."""

LEVELS = ("contestants", "calls", "shapes", "functions", "variants")  # names that say nothing in the table


def timed(figures: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Everything that has been timed, by the names that lead there: whatever has a median in milliseconds."""
    for key, value in figures.items():
        if isinstance(value, Mapping):
            inner = name if key in LEVELS else f"{name} {key}".strip()
            found = value.get("ms")
            if isinstance(found, Mapping) and "median" in found:
                yield inner, value
            yield from timed(value, inner)


def line(name: str, row: Mapping[str, Any]) -> str:
    """One line of the table; what a benchmark does not measure is left free."""
    cells = [f"{row['ms']['median']:12.3f}"]
    cells.append(f"{row['mfu']:8.1%}" if "mfu" in row else " " * 8)
    cells.append(f"{row['tokens_per_s']:12,.0f}" if "tokens_per_s" in row else " " * 12)
    cells.append(f"{row['peak_gib']:10.1f}" if "peak_gib" in row else " " * 10)
    return f"{name:50}{''.join(cells)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for and print the table.

    Raises:
        BerniniError: A benchmark failed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.all", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=COMMANDS, default=[*COMMANDS], metavar="NAME", help="(default: all)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder of figures (default: runs/speed)")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU, to see that they run")
    args = parser.parse_args(arguments)
    lines, failed = [], []
    for name in args.only:
        command, small = COMMANDS[name]
        path = args.out / f"{name}.json"
        path.unlink(missing_ok=True)
        module, *verb = shlex.split(command)
        words = [*verb, *(shlex.split(small) if args.small else []), "--json", str(path)]
        print(f"\n== {module} {shlex.join(words)}", flush=True)
        done = subprocess.run([sys.executable, "-m", f"benchmarks.speed.{module}", *words])
        if done.returncode:
            failed.append(name)
        else:
            lines += [line(f"{name}: {what}", row) for what, row in timed(json.loads(path.read_text()))]
    print(f"\n{'':50}{'ms':>12}{'MFU':>8}{'tokens/s':>12}{'peak GiB':>10}")
    print("\n".join(lines))
    if failed:
        raise BerniniError(f"{', '.join(failed)} failed", why="see above", fix=f"--only {' '.join(failed)}")


if __name__ == "__main__":
    run_command(main)

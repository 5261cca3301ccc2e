"""What the speed commands have in common: their device, their progress, their file of figures, how they fail."""

import json
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bernini.errors import BerniniError, ConfigError


def stopwatch() -> Callable[[str], None]:
    """A function that prints a line behind the seconds since now."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", flush=True)

    return say


def add_timing(parser: ArgumentParser) -> None:
    """Add the options of commands that time short calls: ``--rounds``, ``--repeats``, ``--warmup``, and those below."""
    parser.add_argument("--rounds", type=int, default=10, help="times of each (default: 10)")
    parser.add_argument("--repeats", type=int, default=10, help="calls of which one time is taken (default: 10)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed calls of each (default: 3)")
    add_shared(parser)


def add_shared(parser: ArgumentParser) -> None:
    """Add the options of commands that compile and write: ``--backend``, ``--device``, ``--json``."""
    parser.add_argument("--backend", default="inductor", help="what torch.compile compiles with (default: inductor)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")


def open_device(name: str, small: str) -> torch.device:
    """The device of that name.

    Args:
        name: ``cuda`` or ``cpu``.
        small: Arguments under which the command runs on a CPU.

    Raises:
        ConfigError: It is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device", where="--device", fix=f"try it small: {small}")
    return torch.device(name)


def refuse_below_one(counts: Mapping[str, int]) -> None:
    """Check counts by the names of their options.

    Raises:
        ConfigError: One is below 1.
    """
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"--{name} is {value}", fix="give at least 1")


def write_json(figures: Mapping[str, Any], path: Path | None) -> None:
    """Write figures, if there is somewhere to write them."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n")


def run_command(main: Callable[[], object]) -> None:
    """Run a command; errors of this project end it with their own text and exit code."""
    try:
        main()
    except BerniniError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)

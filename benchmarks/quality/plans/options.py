"""Options that all commands about plans have."""

import argparse
import os

import torch

from benchmarks.quality.plans.exam import Exam
from bernini.errors import ConfigError


def add_exam(parser: argparse.ArgumentParser) -> None:
    """Add the options of the exam and of the device."""
    add, exam = parser.add_argument, Exam()
    add("--items", type=int, default=exam.items, help="held-out samples of each category")
    add("--probe-items", type=int, default=exam.probe_items, help="targets of training samples for each probe")
    add("--frames", type=int, default=exam.frames, help="frames of a clip")
    add("--size", type=int, default=exam.size, help="height and width in pixels")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw samples and read outputs")
    add("--batch", type=int, default=64, help="samples at once")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device of the model")


def exam_of(options: argparse.Namespace) -> Exam:
    """The exam that was asked for.

    Raises:
        ConfigError: A number is too small.
    """
    for name in ("items", "probe_items", "frames", "batch"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is at least 1")
    return Exam(options.items, options.probe_items, options.frames, options.size)

"""The command: plan, answer, compare, and write down what came out."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality.environment import environment
from benchmarks.quality.plans import __doc__ as about
from benchmarks.quality.plans.exam import ANSWERED, PLANNED, Sheets
from benchmarks.quality.plans.measuring import Truth, answer, load, measure, plan
from benchmarks.quality.plans.options import add_exam, exam_of
from benchmarks.quality.plans.report import draw, write
from benchmarks.speed.command import run_command, stopwatch
from bernini.errors import ConfigError
from bernini.planner.planning import PlanningConfig
from bernini.planner.reveal import Order
from bernini.report import Case


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Run the command; gives what ``plans.json`` holds."""
    options = parse(argv)
    disable_progress_bar()  # of loading models
    say = stopwatch()
    config = PlanningConfig(options.steps, options.flow_steps, options.txt, options.img, options.order)
    model, template = load(options.model, getattr(torch, options.dtype), torch.device(options.device))
    sheets = Sheets(exam_of(options), template)
    truth = Truth(model, sheets, options.batch, options.workers)
    plans: dict[str, Any] = {}
    answers: dict[str, Any] = {}
    cases: list[Case] = []
    for category in options.tasks:
        if category in ANSWERED:
            answers[category] = answer(model, sheets.asked(category), options.batch)
            right = sum(record["right"] for record in answers[category])
            say(f"{category}: {right} of {len(answers[category])} answers are right")
            continue
        (planned,) = plan(model, sheets.planned(category), [config], options.batch)
        plans[category] = asdict(measure(truth, category, planned))
        told = (f"{name} {value:.3f}" for name, value in plans[category]["figures"].items())
        say(f"{category}: {', '.join(told)}")
        for sheet, own in zip(sheets.planned(category)[: options.examples], planned, strict=False):
            cases.append(draw(sheet, own, truth, category, options.out / "pictures"))
    scores = {
        "model": str(options.model),
        "exam": asdict(sheets.exam),
        "planning": asdict(config),
        "command": shlex.join(["python", "-m", "benchmarks.quality.plans", *argv]),
        "environment": environment(),
        "plans": plans,
        "answers": answers,
    }
    write(scores, cases, options.out)
    print((options.out / "table.md").read_text())
    print(f"report: {options.out / 'report.html'}")
    return scores


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: A number is too small.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.plans",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, config = parser.add_argument, PlanningConfig()
    add("--model", type=Path, required=True, help="the planner's folder, with bernini/ and mllm/")
    add("--out", type=Path, default=Path("runs/plans"), help="folder of what is written")
    every = [*PLANNED, *ANSWERED]
    add("--tasks", nargs="+", default=every, choices=every, metavar="TASK", help="of: %(choices)s")
    add("--steps", type=int, default=config.steps, help="planning steps K")
    add("--flow-steps", type=int, default=config.flow_steps, help="steps of the flow head")
    add("--order", choices=get_args(Order), default=config.order, help="order in which tokens are revealed")
    add("--txt", type=float, default=config.txt, help="guidance from text to text with sources")
    add("--img", type=float, default=config.img, help="guidance from nothing to text; 1 and 1 is none")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    add("--examples", type=int, default=2, help="pictures of each category")
    add_exam(parser)
    options = parser.parse_args(argv)
    if options.examples < 0:
        raise ConfigError("--examples is at least 0")
    return options


if __name__ == "__main__":
    run_command(lambda: run(sys.argv[1:]))

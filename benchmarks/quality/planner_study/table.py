"""From the records of all runs to a page of tables; every figure and every verdict is computed from the records."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.bootstrap import DRAWS, Estimate, estimate
from benchmarks.quality.environment import machines
from benchmarks.quality.planner_study.scoring import COMPARED, USUAL, WAYS, way
from benchmarks.quality.plans.exam import ANSWERED, PLANNED
from benchmarks.quality.plans.figures import METRICS, statistic
from benchmarks.quality.plans.measuring import GALLERY, Record
from benchmarks.quality.tables import markdown
from bernini.errors import DataError

VARIANTS = {"beta": "Beta masks", "uniform": "uniform masks", "silent": "Beta masks, no language loss"}
SHOWN = ("retrieval@1", "probe_relative", "cosine")
"""Figures of the comparisons."""


class Records:
    """Scores of all runs.

    Args:
        folder: Folder of the study.

    Raises:
        DataError: Scores are missing, or runs cannot be compared.
    """

    def __init__(self, folder: Path) -> None:
        before = folder / "before.json"
        if not before.is_file():
            raise DataError("nothing tells how well questions were answered before", where=str(before), fix="`before`")
        self.before: dict[str, Any] = json.loads(before.read_text())
        files = sorted(file for file in folder.glob("*.json") if file != before)
        runs = sorted((json.loads(file.read_text()) for file in files), key=lambda run: run["seed"])
        self.runs = {name: own for name in VARIANTS if (own := [run for run in runs if run["variant"] == name])}
        self.seeds = {name: [run["seed"] for run in own] for name, own in self.runs.items()}
        if not {"beta", "uniform"} <= self.runs.keys() or len({tuple(seeds) for seeds in self.seeds.values()}) > 1:
            raise DataError(
                "the masks cannot be compared",
                where=str(folder),
                why="; ".join(f"{name}: seeds {self.seeds.get(name, [])}" for name in VARIANTS),
                fix="train and score beta and uniform masks from the same seeds",
            )
        first = self.runs["beta"][0]
        for name, alike in (("recipe", runs), ("exam", [self.before, *runs])):
            if any(run[name] != first[name] for run in alike):
                raise DataError(f"the runs differ in {name}", where=str(folder), fix="train and score them all alike")

    def plans(self, variant: str, category: str, metric: str, name: str = way(USUAL)) -> Estimate:
        """A figure of the plans of all seeds of a variant."""
        return _estimate([run["plans"][name][category] for run in self.runs[variant]], metric)

    def answers(self, variant: str, task: str) -> Estimate:
        """Share of right answers; those of ``before`` are of one planner."""
        return _estimate([run["answers"][task] for run in self.runs.get(variant, [self.before])], "answers")


def _estimate(runs: Sequence[Sequence[Record]], metric: str) -> Estimate:
    return estimate([statistic(records, metric) for records in runs], len(runs[0]))


def _all(records: Records, variant: str) -> str:
    body = [[name, *(records.plans(variant, name, metric).text() for metric in METRICS)] for name in PLANNED]
    return markdown(["", *(metric.replace("_", " ") for metric in METRICS)], body)


def _less(records: Records, one: str, other: str) -> str:
    """What plans of one variant are better by than those of another."""
    body = []
    for category in PLANNED:
        gaps = [records.plans(one, category, metric) - records.plans(other, category, metric) for metric in SHOWN]
        body.append([category, *(f"{gap.text('+')} {gap.verdict}" for gap in gaps)])
    return markdown(["", *(metric.replace("_", " ") for metric in SHOWN)], body)


def _ways(records: Records, what: str) -> str:
    """One table a figure: rows are ways to plan under both kinds of masks, columns categories."""
    parts = []
    for metric in SHOWN:
        body = [
            [VARIANTS[variant], f"**{value}**" if config == USUAL else value]
            + [records.plans(variant, category, metric, way(config)).text() for category in COMPARED]
            for variant in ("beta", "uniform")
            for value, config in WAYS[what].items()
        ]
        parts.append(f"{_sentence(metric)}\n\n{markdown(['', what, *COMPARED], body)}")
    return "\n\n".join(parts)


def _sentence(metric: str) -> str:
    return f"{metric.replace('_', ' ').capitalize()}: {METRICS[metric]}."


def _understanding(records: Records) -> str:
    body = [["before", *(records.answers("before", task).text() for task in ANSWERED)]]
    for variant in records.runs:
        after = [records.answers(variant, task) for task in ANSWERED]
        gaps = [own - records.answers("before", task) for own, task in zip(after, ANSWERED, strict=True)]
        body.append([VARIANTS[variant], *(own.text() for own in after)])
        body.append([f"{VARIANTS[variant]}, less before", *(f"{gap.text('+')} {gap.verdict}" for gap in gaps)])
    return markdown(["", *ANSWERED], body)


def _price(records: Records) -> str:
    """What the language loss takes from plans; nothing where no run went without it."""
    if "silent" not in records.runs:
        return ""
    told = f"Plans of training with the language loss less those of training without ({VARIANTS['beta']}):"
    return f"\n{told}\n\n{_less(records, 'beta', 'silent')}\n"


def _fit(recipe: dict[str, Any], config: str, run: str, more: Sequence[str] = ()) -> str:
    schedule = "--model.lr_scheduler.init_args"
    lines = [
        f"RUN={run} bernini fit -c configs/toy/{config}.yaml -c configs/toy/banked.yaml",
        *more,
        f"--trainer.max_steps {recipe['steps']} {schedule}.total_steps {recipe['steps']}",
        f"{schedule}.max_lr {recipe['lr']:g} --data.batch_size {recipe['batch']} --data.length {recipe['samples']}",
    ]
    return " \\\n    ".join(lines)


def _commands(records: Records) -> str:
    recipe, exam = records.runs["beta"][0]["recipe"], records.before["exam"]
    options = {"beta": "", "uniform": " --model.loss.ratios uniform", "silent": " --model.loss.ntp 0"}
    program = "python -m benchmarks.quality.planner_study"
    asked = (
        f"--items {exam['items']} --probe-items {exam['probe_items']} --frames {exam['frames']} --size {exam['size']}"
    )
    seeds = " ".join(map(str, records.seeds["beta"]))
    lines = [_fit(records.before["recipe"], "sight", "runs/planner/sight"), f"for seed in {seeds}; do"]
    for variant in records.runs:
        more = [
            f"--seed_everything $seed --model.init_from runs/planner/sight/planner{options[variant]}",
            "--data.file runs/planner/bank-$seed.safetensors",
        ]
        lines.append("  " + _fit(recipe, "planner", f"runs/planner/{variant}-$seed", more))
    return "\n".join(
        [
            *lines,
            "done",
            f"{program} before runs/planner/sight {asked}",
            f"{program} score runs/planner/*-[0-9] {asked}",
            f"{program} table",
        ]
    )


def _scored(records: Records) -> str:
    every = (run for runs in records.runs.values() for run in runs)
    runs = [(f"{run['variant']} {run['seed']}", run["environment"]) for run in every]
    return "\n".join(f"- {line}" for line in machines(runs))


def page(records: Records) -> str:
    """The page, in Markdown."""
    exam, run = records.before["exam"], records.runs["beta"][0]
    recipe = run["recipe"]
    usual = f"{USUAL.steps} planning steps, {USUAL.flow_steps} flow steps, order {USUAL.order}, guidance txt "
    usual += f"{USUAL.txt:g} and img {USUAL.img:g}"
    told = "\n".join(f"- {_sentence(metric)}" for metric in METRICS)
    return f"""# Plans

How good the plans of the toy planner are, alone, and what they owe to its training and to how they are made. Plans are
of held-out samples of the toy world, {exam["items"]} of each task and of reasoning edits, {exam["frames"]} frames of
{exam["size"]} x {exam["size"]} pixels. Unless said otherwise they are made as the released planner makes them: {usual}.

Figures are percentages, cosines times 100, means over items and over {len(records.seeds["beta"])} seed(s) of training,
with 95 % intervals from {DRAWS:,} bootstrap draws of seeds and items, paired where two are compared. Few seeds make for
rough intervals. A plan's own target is told from those of its task, {min(GALLERY, exam["items"])} in all. Probes learn
from {exam["probe_items"]:,} targets of training samples, images and clips apart.

{told}

## All tasks

{VARIANTS["beta"]}, as in the paper:

{_all(records, "beta")}

{VARIANTS["uniform"].capitalize()}:

{_all(records, "uniform")}

## Beta masks less uniform masks

{_less(records, "beta", "uniform")}

## Planning steps

{_ways(records, "steps")}

## Flow steps

{_ways(records, "flow steps")}

## Order

{_ways(records, "order")}

## Guidance

Off is txt 1 and img 1. Without sources only img counts, so on and off are the same for t2v.

{_ways(records, "guidance")}

## Understanding

Answers that greedy decoding gives rightly, word for word, before and after planner training.

{_understanding(records)}
{_price(records)}

## How it was made

{recipe["steps"]:,} steps of {recipe["batch"]} samples from {recipe["samples"]:,}, peak learning rate
{recipe["lr"]:g}; a moving average of the weights is scored. Scored on:

{_scored(records)}

```
{_commands(records)}
```
"""

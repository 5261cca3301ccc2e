"""From the records of all runs to a page of tables; every figure and every verdict is computed from the records."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.bootstrap import DRAWS, Estimate, estimate, mean_of
from benchmarks.quality.cotraining_study.commands import commands
from benchmarks.quality.cotraining_study.runs import VARIANTS
from benchmarks.quality.cotraining_study.scoring import NEEDED, PARTS, REASONING
from benchmarks.quality.environment import machines
from benchmarks.quality.plans.exam import ANSWERED, PLANNED
from benchmarks.quality.plans.figures import METRICS as PLAN_METRICS
from benchmarks.quality.plans.figures import statistic
from benchmarks.quality.tables import markdown
from benchmarks.quality.toy import ToyBenchmark
from bernini.cotraining.exposure import KINDS
from bernini.errors import DataError

WAYS = {"without": "no plan", "predicted": "predicted plan", "true": "true plan"}
THINKING = {"predicted": "none", "text": "text", "vision": "vision"}
EXPOSED = ("paper", "full", "noised", "planned")
"""Variants that differ in the plan that the renderer was trained on."""

Cell = tuple[str, str]
"""Variant and way."""


class Records:
    """Scores of all runs.

    Args:
        folder: Folder of the study.

    Raises:
        DataError: Scores are missing, or runs cannot be compared.
    """

    def __init__(self, folder: Path) -> None:
        found = sorted(path for path in folder.glob("*-*") if path.is_dir())
        scored = {part for part in PARTS for run in found if _file(run, part).is_file()} | {*NEEDED}
        self.planned = [part for part in PLANNED if part in scored]
        self.parts = {run.name: {part: _read(_file(run, part)) for part in PARTS if part in scored} for run in found}
        self.facts = {name: parts[NEEDED[0]] for name, parts in self.parts.items()}
        self.runs: dict[str, list[str]] = {}
        for name, facts in sorted(self.facts.items(), key=lambda item: item[1]["training"]["seed"]):
            self.runs.setdefault(facts["variant"], []).append(name)
        self.runs = {variant: self.runs[variant] for variant in VARIANTS if variant in self.runs}
        self.seeds = {variant: [self._seed(name) for name in names] for variant, names in self.runs.items()}
        self._check(folder)
        self.edits = self.scored("edit_done")

    def _seed(self, name: str) -> int:
        return self.facts[name]["training"]["seed"]

    def _check(self, folder: Path) -> None:
        wanted = {"before", "paper", "cold"}
        # Reasoning is compared within its own runs, which may be fewer.
        others = {tuple(seeds) for variant, seeds in self.seeds.items() if variant not in ("before", "thinking")}
        alone = len(self.seeds.get("before", ())) == 1  # one planner may be what all go on from
        if not wanted <= self.runs.keys() or len(others if alone else others | {tuple(self.seeds["before"])}) > 1:
            raise DataError(
                "the runs cannot be compared",
                where=str(folder),
                why="; ".join(f"{name}: seeds {self.seeds.get(name, [])}" for name in VARIANTS),
                fix=f"train and score {', '.join(sorted(wanted))} and whatever else is compared from the same seeds",
            )
        exposed = [name for variant in EXPOSED for name in self.runs.get(variant, ())]
        alike = [
            ("settings", [*self.facts]),
            ("recipe", [*exposed, *self.runs["cold"]]),
            ("recipe of the warm-up", exposed),
            *(("recipe", self.runs.get(variant, [])) for variant in ("before", "thinking")),
            *(("exposure", names) for names in self.runs.values()),
        ]
        for what, names in alike:
            values = [self._told(name)[what] for name in names]
            if any(value != values[0] for value in values):
                raise DataError(
                    f"the runs differ in {what}",
                    where=str(folder),
                    why=f"{', '.join(names)} are compared",
                    fix="train and score them all alike",
                )

    def _told(self, name: str) -> dict[str, Any]:
        facts = self.facts[name]
        begun = facts["start"] and facts["start"]["recipe"]
        return {**facts["training"], "settings": facts["settings"], "recipe of the warm-up": begun}

    def exposure(self, name: str) -> dict[str, Any]:
        """Shares of the plans that the renderer of a run was trained on."""
        return self.facts[name]["training"]["exposure"]

    def score(self, cell: Cell, categories: Sequence[str], metric: str = "edit_done") -> Estimate:
        """A score over all items of categories and all seeds of a variant."""
        variant, way = cell
        rows = [[row for c in categories for row in self.parts[name][c]["scores"][way]] for name in self.runs[variant]]
        return estimate([mean_of(np.array([row[metric] for row in own])) for own in rows], len(rows[0]))

    def scored(self, metric: str) -> list[str]:
        """Categories of whose items all have a score."""
        parts = next(iter(self.parts.values()))
        return [c for c in self.planned if all(metric in row for row in parts[c]["scores"]["predicted"])]

    def answers(self, variant: str, task: str) -> Estimate:
        """Share of right answers."""
        rows = [self.parts[name][task]["answers"] for name in self.runs[variant]]
        return estimate([statistic(own, "answers") for own in rows], len(rows[0]))

    def plans(self, variant: str, metric: str) -> Estimate:
        """A figure of the predicted plans of all categories."""
        rows = [[row for c in self.planned for row in self.parts[name][c]["plans"]] for name in self.runs[variant]]
        return estimate([statistic(own, metric) for own in rows], len(rows[0]))

    @property
    def groups(self) -> dict[str, list[str]]:
        """What edits are put together."""
        return {
            "reasoning edits": [*REASONING],
            "other edits": [category for category in self.edits if category not in REASONING],
        }


def _file(run: Path, part: str) -> Path:
    return run / f"{part.replace('/', '-')}.json"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError("a run is not scored to the end", where=str(path), fix="`score` goes on with what is missing")
    return json.loads(path.read_text())


def _gap(gap: Estimate) -> str:
    return f"{gap.text('+')} {gap.verdict}"


def _gaps(records: Records, rows: Mapping[str, tuple[Cell, Cell]], columns: Mapping[str, Sequence[str]]) -> str:
    """Differences of the cells of each row."""
    body = [
        [name, *(_gap(records.score(a, group) - records.score(b, group)) for group in columns.values())]
        for name, (a, b) in rows.items()
    ]
    return markdown(["", *columns], body)


def _scores(records: Records, metric: str, columns: Mapping[str, Sequence[str]]) -> str:
    """Every variant with every plan."""
    body = [
        [VARIANTS[variant], text, *(records.score((variant, way), group, metric).text() for group in columns.values())]
        for variant in records.runs
        for way, text in WAYS.items()
    ]
    return markdown(["", "", *columns], body)


def _each(categories: Sequence[str]) -> dict[str, list[str]]:
    return {category: [category] for category in categories}


def _worth(records: Records) -> str:
    pairs = (("predicted", "without"), ("true", "predicted"))
    rows = {
        f"{VARIANTS[variant]}: {WAYS[a]} less {WAYS[b]}": ((variant, a), (variant, b))
        for variant in records.runs
        for a, b in pairs
    }
    return _gaps(records, rows, records.groups)


def _verdicts(records: Records) -> str:
    """What plans are worth on reasoning edits, for the paper's recipe and for the best one, in words."""

    def told(variant: str) -> str:
        without, predicted, true = (records.score((variant, way), REASONING) for way in WAYS)
        worth, lost = predicted - without, true - predicted
        return f"predicted less none {worth.text('+')}, {worth.verdict}; true less predicted {lost.text('+')}."

    shown = [variant for variant in EXPOSED if variant in records.runs]
    best = max(shown, key=lambda variant: records.score((variant, "predicted"), REASONING).mean)
    return f"- Reasoning edits, {VARIANTS['paper']}: {told('paper')}\n" + (
        f"- Reasoning edits, best with the predicted plan, which is {VARIANTS[best]}: {told(best)}"
    )


def _warm(records: Records) -> str:
    rows: dict[str, tuple[Cell, Cell]] = {text: (("paper", way), ("cold", way)) for way, text in WAYS.items()}
    return _gaps(records, rows, records.groups)


def _exposed(records: Records) -> str:
    rows: dict[str, tuple[Cell, Cell]] = {
        f"{VARIANTS[variant]} ({records.exposure(records.runs[variant][0])[variant]:.0%}): {text}": (
            (variant, way),
            ("paper", way),
        )
        for variant in EXPOSED[1:]
        if variant in records.runs
        for way, text in WAYS.items()
    }
    if not rows:
        return "Nothing else was trained."
    return f"Less {VARIANTS['paper']}:\n\n{_gaps(records, rows, records.groups)}"


def _thinking(records: Records) -> str:
    if "thinking" not in records.runs:
        return "No run was trained with reasoning."
    clips, both = {"v2v/reason": ["v2v/reason"]}, _each(REASONING)
    body = [
        [
            text,
            *(
                records.score(("thinking", way), group).text() if way != "vision" or name in clips else ""
                for name, group in both.items()
            ),
        ]
        for way, text in THINKING.items()
    ]
    rows: dict[str, tuple[Cell, Cell]] = {"text less none": (("thinking", "text"), ("thinking", "predicted"))}
    seen: dict[str, tuple[Cell, Cell]] = {
        f"vision less {text}": (("thinking", "vision"), ("thinking", way))
        for way, text in THINKING.items()
        if way != "vision"
    }
    right = records.score(("thinking", "text"), REASONING, "concluded").text()
    return "\n\n".join(
        [
            markdown(["reasoning", *both], body),
            _gaps(records, rows, both),
            _gaps(records, seen, clips),
            f"Prompts that the planner concludes rightly, word for word: {right}.",
        ]
    )


def _planner(records: Records) -> str:
    """Answers and plans before and after."""

    def figures(variant: str) -> list[Estimate]:
        plans = [records.plans(variant, metric) for metric in PLAN_METRICS]
        return [*(records.answers(variant, task) for task in ANSWERED), *plans]

    before = figures("before")
    body = [[VARIANTS["before"], *(own.text() for own in before)]]
    for variant in records.runs:
        if variant != "before":
            after = figures(variant)
            body.append([VARIANTS[variant], *(own.text() for own in after)])
            gaps = [own - old for own, old in zip(after, before, strict=True)]
            body.append([f"{VARIANTS[variant]}, less before", *map(_gap, gaps)])
    return markdown(["", *ANSWERED, *(metric.replace("_", " ") for metric in PLAN_METRICS)], body)


def _others(records: Records) -> str:
    told = {m: text for m, text in ToyBenchmark.metrics.items() if m != "edit_done" and records.scored(m)}
    return "\n\n".join(
        f"{metric.replace('_', ' ').capitalize()}: {text}.\n\n{_scores(records, metric, _each(records.scored(metric)))}"
        for metric, text in told.items()
    )


def _recipes(records: Records) -> str:
    body = []
    for variant, names in records.runs.items():
        training = records.facts[names[0]]["training"]
        recipe, shares = training["recipe"], training["exposure"] or {}
        seen = ", ".join(f"{kind} {share:.0%}" for kind in KINDS if (share := shares.get(kind)))
        batch = recipe.get("batch_size", sum(recipe["tasks"].values()))
        seeds = " ".join(map(str, records.seeds[variant]))
        start = re.sub(r"-\d+$", "", training["start"])
        figures = [seeds, start, seen, f"{recipe['steps']:,}", f"{batch:g}", f"{recipe['lr']:g}"]
        body.append([VARIANTS[variant], *figures, f"{recipe['length']:,}" if "length" in recipe else ""])
    return markdown(["", "seeds", "goes on from", "plans", "steps", "batch", "peak learning rate", "samples"], body)


def _scored(records: Records) -> str:
    told = [(name, part["environment"]) for name, parts in records.parts.items() for part in parts.values()]
    return "\n".join(f"- {line}" for line in machines(told))


def page(records: Records) -> str:
    """The page, in Markdown."""
    settings = next(iter(records.facts.values()))["settings"]
    exam, sampling, planning = settings["exam"], settings["sampling"], settings["planning"]
    guided = ", ".join(f"{name} {value:g}" for name, value in sampling["omegas"].items() if name != "scale")
    return f"""# Planner and renderer together

What plans are worth to the toy renderer, and what co-training does to the toy planner. Held-out samples of the toy
world, {exam["items"]} of each task and of reasoning edits, {exam["frames"]} frames of {exam["size"]} x {exam["size"]}
pixels, are rendered by one and the same model with no plan, with the plan that it predicts, and with the true plan,
which shows the true embeddings of the target in the place of predicted ones. Noise is the same for all three. The
verifier of `bernini bench toy` scores what was made.

Guidance is fixed: mode `{sampling["mode"]}` with a plan, `{sampling["without"]}` without one, weights {guided}; all 1
is none, unless a mode projects. {sampling["steps"]} steps of {sampling["solver"]}. Plans are predicted in
{planning["steps"]} planning steps and {planning["flow_steps"]} flow steps, guidance txt {planning["txt"]:g} and img
{planning["img"]:g}.

Figures are percentages, cosines times 100, means over items and over {len(records.seeds["paper"])} seed(s) of training,
with 95 % intervals from {DRAWS:,} bootstrap draws of seeds and items, paired where two are compared. Few seeds make for
rough intervals.

## What a plan is worth

{_verdicts(records)}

Edit done: {ToyBenchmark.metrics["edit_done"]}.

{_scores(records, "edit_done", records.groups | _each(records.edits))}

{_worth(records)}

## Warm-up of the connector

Edits done after a warm-up, less those without.

{_warm(records)}

## The plan that the renderer is trained on

Edits done. The paper's renderer reads the visible target tokens; the others read another plan in the share of the
samples that is given.

{_exposed(records)}

## Thinking before drawing

Edits done with the predicted plan, where the planner has rewritten the instruction (text), or has also edited the first
frame, which the clip then follows (vision).

{_thinking(records)}

## The planner before and after

Answers that greedy decoding gives rightly, word for word, and predicted plans of all categories together.

{_planner(records)}

## Other scores

{_others(records)}

## How it was made

{_recipes(records)}

A moving average of the weights is scored. Scored on:

{_scored(records)}

```
{commands(records.runs, records.facts, records.planned)}
```
"""

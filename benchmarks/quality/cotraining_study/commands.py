"""The commands that made a study, as its records tell them."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from benchmarks.quality.cotraining_study.runs import STARTING
from benchmarks.quality.cotraining_study.scoring import NEEDED
from benchmarks.quality.plans.exam import PLANNED

CONFIGS = {"before": ("planner", "banked"), "warmup": ("warmup", "cobanked")}
COTRAINED = ("cotrain", "cobanked")
"""Configurations in ``configs/toy``: of the training, and what is added to it from a bank."""


def commands(runs: Mapping[str, Sequence[str]], facts: Mapping[str, Mapping[str, Any]], planned: Sequence[str]) -> str:
    """Commands that train, score and tabulate.

    Args:
        runs: Names of the runs of each variant.
        facts: What the scores of each run say of it.
        planned: What was rendered.
    """
    program, folder = "python -m benchmarks.quality.cotraining_study", "runs/cotraining"
    trained: dict[str, Mapping[str, Any]] = {}
    for names in runs.values():
        for training in (facts[names[0]]["start"], facts[names[0]]["training"]):
            if training:
                trained.setdefault(training["name"].rpartition("-")[0], training)
    # Such as one planner that all seeds go on from.
    numbers = {variant: [facts[name]["training"]["seed"] for name in names] for variant, names in runs.items()}
    once = [variant for variant in runs if numbers[variant] != numbers["paper"]]
    first, last = ([v for v in once if (v == "before") == begins] for begins in (True, False))
    fits = {variant: _fit(variant, training, once) for variant, training in trained.items()}
    seeds = " ".join(map(str, numbers["paper"]))
    settings = facts[runs["paper"][0]]["settings"]
    exam, sampling = settings["exam"], settings["sampling"]
    omegas = (f"--omega-{name} {value:g}" for name, value in sampling["omegas"].items() if value != 1)
    score = [
        f"{program} score {folder}/{{{','.join(runs)}}}-[0-9]*",
        f"--items {exam['items']} --probe-items {exam['probe_items']} --frames {exam['frames']} --size {exam['size']}",
        *([] if len(planned) == len(PLANNED) else [f"--tasks {' '.join(c for c in planned if c not in NEEDED)}"]),
        " ".join([f"--steps {sampling['steps']} --mode {sampling['mode']}", *omegas]),
    ]
    return "\n".join(
        [
            *(fits[variant] for variant in first),
            f"for seed in {seeds}; do",
            *(f"  {fit}" for variant, fit in fits.items() if variant not in once),
            "done",
            *(fits[variant] for variant in last),
            " \\\n    ".join(score),
            f"{program} table",
        ]
    )


def _fit(variant: str, training: Mapping[str, Any], once: Sequence[str]) -> str:
    config, bank = CONFIGS.get(variant, COTRAINED)
    recipe, exposure = training["recipe"], training["exposure"]
    schedule = "--model.lr_scheduler.init_args"
    run, start = _name(training["name"], once), _start(training["start"], once)
    lines = [
        f"RUN=runs/cotraining/{run} bernini fit -c configs/toy/{config}.yaml"
        + f" -c configs/toy/{bank}.yaml" * training["banked"],
        f"--seed_everything {run.rpartition('-')[2]} ",
        f"--trainer.max_steps {recipe['steps']} {schedule}.total_steps {recipe['steps']} "
        f"{schedule}.max_lr {recipe['lr']:g}",
        " ".join(f"--data.{name} {recipe[name]}" for name in ("batch_size", "length") if name in recipe),
    ]
    if exposure is None:
        lines[1] += f"--model.init_from {start}/planner"
    else:
        weights = "planner" if training["start"].startswith("before") else "model"
        lines[1] += f"--model.init_from.planner {start}/{weights}"
        if training["whole"]:
            lines.append(f"--model.init_from.renderer {start}/{weights}")
        if exposure["visible"] < 1:
            lines.append(f"--model.exposure '{_flow({kind: share for kind, share in exposure.items() if share})}'")
    if variant == "thinking":
        lines.append(f"--data.tasks '{_flow(recipe['tasks'])}'")
    return " \\\n    ".join(line for line in lines if line)


def _start(run: str, once: Sequence[str]) -> str:
    """Folder of a run that another goes on from; one that is not of the study lies beside it."""
    return f"runs/cotraining/{_name(run, once)}" if run.partition("-")[0] in STARTING else f"runs/{run}"


def _name(run: str, once: Sequence[str]) -> str:
    """A run's name with its seed as the loop has it."""
    variant = run.rpartition("-")[0]
    return run if variant in once else f"{variant}-$seed"


def _flow(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), default_flow_style=True, sort_keys=False, width=1000).strip()

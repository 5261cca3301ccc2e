"""The demo's first part: edits that say what to change only by a riddle, rendered with a plan and without one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.demo.commands import FRAMES, PLANNING_FAMILY, SIZE, Command, bench, cells, watch_scores
from benchmarks.quality.folder import RunFolder
from benchmarks.quality.interface import Item
from benchmarks.quality.tables import write_inputs
from benchmarks.quality.toy import ToyBenchmark
from bernini.media import write_image
from bernini.planner.conversations import ConversationPlanner
from bernini.planner.picture import lay_out, one_above_other, plan_picture, token_patches
from bernini.planner.planning import PlanningConfig
from bernini.planner.validation import token_grid, true_target
from bernini.renderer.sampling import SamplingConfig
from bernini.report import Case

EDIT, SHOWN = "reason", 6
RUNS = {"unplanned": "from the text alone", "planned": "with a plan"}


def run(out: Path, count: int, progress: Progress) -> tuple[dict[str, Any], list[Case], list[Command]]:
    """Score the edits both ways.

    Args:
        out: The demo's folder.
        count: Clips that are edited.
        progress: Bar to show how far it is.

    Returns:
        Metrics of each way, examples, and the commands.
    """
    commands = [bench(PLANNING_FAMILY, out, name, EDIT, count, *["--no-plan"] * (name == "unplanned")) for name in RUNS]
    for (name, text), command in zip(RUNS.items(), commands, strict=True):
        command.run(watch_scores(RunFolder(out / name), f"reasoning edits {text}", count, progress))
    benchmark = ToyBenchmark(tasks=("v2v",), edits=(EDIT,), per_task=count, frames=FRAMES, size=SIZE)
    return {name: cells(RunFolder(out / name)) for name in RUNS}, _cases(out, benchmark), commands


def _cases(out: Path, benchmark: ToyBenchmark) -> list[Case]:
    """Source, the plan below the true target, what came without it, and what came of it."""
    items = benchmark.items()
    pictures = _draw_plans(out / "plans", benchmark, items, SHOWN)
    values = RunFolder(out / "planned").values(benchmark.metrics)
    cases = []
    for item, picture in zip(items, pictures, strict=False):
        *sources, _ = write_inputs(benchmark, item, out / "examples")
        made = [(text, RunFolder(out / name).output(benchmark, item)) for name, text in RUNS.items()]
        scores = {m.replace("_", " "): values[item.id, m] for m in item.metrics if (item.id, m) in values}
        cases.append(Case(item.id, item.prompt, [*sources, ("target, plan", picture), *made], scores))
    return cases


@torch.no_grad()
def _draw_plans(folder: Path, benchmark: ToyBenchmark, items: Sequence[Item], count: int) -> list[Path]:
    """Pictures of the first plans: each token shows the patch, of all targets, whose embedding is most like it."""
    planner = ConversationPlanner.from_pretrained(PLANNING_FAMILY)
    samples = [benchmark.conversation(item) for item in items]
    targets = [true_target(sample, planner.template.vision) for sample in samples]
    true, patches = planner.model.see(targets), [token_patches(target) for target in targets]
    seeds = [item.seed(SamplingConfig().seed) % 2**32 for item in items[:count]]
    plans = planner(samples[:count], seeds, PlanningConfig(), [None] * len(seeds))
    files = []
    for item, plan, target, own in zip(items, plans, targets, patches, strict=False):
        grid = token_grid(target)
        planned = plan_picture(plan.embeds, grid, true, torch.cat(patches))
        files.append(folder / f"{item.id.replace('/', '-')}.png")
        write_image(files[-1], one_above_other([lay_out(own, grid), planned]))
    return files

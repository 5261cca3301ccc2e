"""What `python -m benchmarks.quality.plans` writes: the records, a table and a page with pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.plans.exam import Sheet
from benchmarks.quality.plans.figures import METRICS, text
from benchmarks.quality.plans.measuring import GALLERY, Record, Truth
from benchmarks.quality.tables import markdown
from bernini.files import replacing
from bernini.media import write_image
from bernini.planner.picture import lay_out, one_above_other, plan_picture, token_patches
from bernini.planner.validation import token_grid
from bernini.planner.vision import Visual
from bernini.report import Case, Report, Table, write_report

NOTE = f"Per cent, cosines times 100, with 95 % intervals over items. Galleries have at most {GALLERY} targets."


def tables(scores: dict[str, Any]) -> list[Table]:
    """Plans by category, and answers by task and kind of question."""
    found = []
    if plans := scores["plans"]:
        head = ["category", "items", *(metric.replace("_", " ") for metric in METRICS)]
        body = [
            [name, str(len(own["records"])), *(text(own["records"], metric) for metric in METRICS)]
            for name, own in plans.items()
        ]
        told = "; ".join(f"{name.replace('_', ' ')}: {meaning}" for name, meaning in METRICS.items())
        found.append(Table("Plans", head, body, f"{NOTE} {told[0].upper()}{told[1:]}."))
    if answers := scores["answers"]:
        kinds = sorted({record["kind"] for records in answers.values() for record in records})
        body = [["all", *(text(records, "answers") for records in answers.values())]]
        body += [[kind, *(_of_kind(records, kind) for records in answers.values())] for kind in kinds]
        note = "Questions that greedy decoding answers rightly, word for word, in per cent."
        found.append(Table("Answers", ["question", *answers], body, note))
    return found


def _of_kind(records: Sequence[Record], kind: str) -> str:
    own = [record for record in records if record["kind"] == kind]
    return text(own, "answers") if own else ""


def draw(sheet: Sheet, plan: Tensor, truth: Truth, category: str, folder: Path) -> Case:
    """Write an example's pictures: its sources, and the true target above the plan.

    Args:
        sheet: The sample.
        plan: ``[N, D]`` its plan.
        truth: Its category's targets are the gallery.
        category: Its category.
        folder: Where to.
    """
    targets = [one.target for one in truth.sheets.planned(category)]
    gallery = torch.cat([token_patches(target) for target in targets])
    grid = token_grid(sheet.target)
    planned = plan_picture(plan, grid, truth.embeds(category).flatten(0, 1), gallery)
    shown = [(f"source {i}", _frames(visual)[:, None]) for i, visual in enumerate(sheet.sources)]
    shown.append(("target, plan", one_above_other([_frames(sheet.target), planned])))
    clips = []
    for label, pixels in shown:
        path = folder / f"{category.replace('/', '-')}-{sheet.key}-{label.replace(', ', '-').replace(' ', '')}.png"
        write_image(path, pixels)
        clips.append((label, path))
    return Case(f"{category} · {sheet.key}", sheet.prompt, clips)


def _frames(visual: Visual) -> Tensor:
    return lay_out(token_patches(visual), token_grid(visual))


def write(scores: dict[str, Any], cases: Sequence[Case], folder: Path) -> None:
    """Write ``plans.json``, ``table.md`` and ``report.html``."""
    made = tables(scores)
    with replacing(folder / "plans.json") as temporary:
        temporary.write_text(json.dumps(scores) + "\n")
    with replacing(folder / "table.md") as temporary:
        temporary.write_text(
            "\n\n".join(f"{table.note}\n\n{markdown(table.head, table.body)}" for table in made) + "\n"
        )
    report = Report(
        title="Plans",
        lead="Plans of held-out samples of the toy world against the true embeddings of their targets. In a picture of "
        "a plan, each token shows the patch of the gallery whose embedding is most like it.",
        tables=made,
        cases=cases,
        commands=[scores["command"]],
        config=json.dumps({name: scores[name] for name in ("model", "exam", "planning")}, indent=2),
        environment=scores["environment"],
    )
    write_report(report, folder / "report.html")

"""GEdit-Bench: semantic consistency and quality from 0 to 10, joined item by item, averaged over eleven groups.

Source: Step1X-Edit, `GEdit-Bench`, whose scores are VIEScore's. Languages are scored apart.
"""

import math
from collections.abc import Mapping

from benchmarks.quality.totals.records import Facts, Range, Records, Scores, Totals, mean
from benchmarks.quality.totals.rules import plain, with_totals

GROUPS = (
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
)
"""Kinds of edit, over which the published figure is a plain mean."""
SCORES = ("success", "over_editing", "naturalness", "artefacts")


def item(row: Mapping[str, float]) -> dict[str, float]:
    """Semantic consistency, perceptual quality and overall score of one item, from its four judged scores 0 to 10."""
    consistency = min(row["success"], row["over_editing"])
    quality = min(row["naturalness"], row["artefacts"])
    return {"G_SC": consistency, "G_PQ": quality, "G_O": math.sqrt(consistency * quality)}


def totals(records: Records, facts: Mapping[str, Facts]) -> Totals:
    """The three figures, then each of them by group, from 0 to 10.

    Args:
        records: The four judged scores of each item; high is good in all of them.
        facts: The items of one language; their category is the group.

    Raises:
        DataError: A score is missing or out of range, a group is unknown or has no item.
    """
    scores = Scores(records, facts, dict.fromkeys(SCORES, Range(0, 10)))
    scores.check_categories(GROUPS)
    joined = {group: [item(row) for row in scores.rows(SCORES, group).values()] for group in GROUPS}
    names = ("G_SC", "G_PQ", "G_O")
    parts = {f"{n} ({group})": mean([row[n] for row in joined[group]], group) for n in names for group in GROUPS}
    return with_totals(parts, [plain(name, [f"{name} ({group})" for group in GROUPS]) for name in reversed(names)])

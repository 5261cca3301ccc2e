"""Bernini-Bench: 22 kinds of edits in five groups, judged from 1 to 5; the overall score is a judgement of its own.

The list of kinds is second-hand: the authors have published neither it nor the prompts.
"""

from collections.abc import Mapping
from typing import Literal

from benchmarks.quality.totals.records import Facts, Range, Records, Scores, Totals, mean

GROUPS = {
    "subject": ("remove", "add", "replace", "pose_action", "attribute", "expression"),
    "scene": ("background", "atmosphere", "weather", "time_season"),
    "style": ("material", "style_transfer", "color", "filter"),
    "camera": ("motion", "position", "viewpoint", "focus"),
    "reasoning": ("causal", "temporal", "spatial", "interaction"),
}
CATEGORIES = tuple(name for group in GROUPS.values() for name in group)
SCORES = {"v2v": ("OS", "IF", "VC", "GQ"), "rv2v": ("OS", "IF", "VC", "IC", "GQ")}
"""Overall score, instruction following, visual consistency, identity consistency with the reference, quality."""


def totals(records: Records, facts: Mapping[str, Facts], *, task: Literal["v2v", "rv2v"] = "v2v") -> Totals:
    """Each score over all items of a task, then over the items of each group that has any, from 1 to 5.

    Args:
        records: Scores of each item.
        facts: The items of one task; their category is the kind of edit.
        task: With a reference image or without.

    Raises:
        DataError: A score is missing or out of range, or a category is unknown.
    """
    scores = Scores(records, facts, dict.fromkeys(SCORES[task], Range(1, 5)))
    scores.check_categories(CATEGORIES)
    found = {f"{task}_{name}": scores.mean(name) for name in SCORES[task]}
    for group, kinds in GROUPS.items():
        for name in SCORES[task]:
            values = [row[name] for kind in kinds for row in scores.rows((name,), kind).values()]
            if values:
                found[f"{task}_{name} ({group})"] = mean(values, name)
    return found

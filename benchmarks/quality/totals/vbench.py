"""VBench 1.0: sixteen dimensions, normalised and weighted into quality, semantic and total.

Source: Vchitect/VBench, `scripts/constant.py` and `scripts/cal_final_score.py`, and each dimension's module for how it
is reduced over videos. Scores and figures are in [0, 1]; the published tables print per cent.
"""

import math
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

from benchmarks.quality.totals.records import SHARE, Facts, Figure, Range, Records, Scores, Totals
from benchmarks.quality.totals.rules import Rule, weighted, with_totals


class Dimension(NamedTuple):
    """How a dimension enters a total: minus ``low``, over ``high - low``, not clipped, times ``weight``."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


QUALITY = {
    "subject_consistency": Dimension(0.1462),
    "background_consistency": Dimension(0.2615),
    "temporal_flickering": Dimension(0.6293),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "dynamic_degree": Dimension(weight=0.5),
    "aesthetic_quality": Dimension(),
    "imaging_quality": Dimension(),
}
SEMANTIC = {
    "object_class": Dimension(),
    "multiple_objects": Dimension(),
    "human_action": Dimension(),
    "color": Dimension(),
    "spatial_relationship": Dimension(),
    "scene": Dimension(high=0.8222),
    "appearance_style": Dimension(0.0009, 0.2855),
    "temporal_style": Dimension(high=0.364),
    "overall_consistency": Dimension(high=0.364),
}
DIMENSIONS = QUALITY | SEMANTIC
LAST_FRAME = "appearance_style_last_frame"

RANGES = dict.fromkeys(DIMENSIONS, SHARE) | {
    "color": Range(0, 1, optional=True),  # of a video where the object is never seen with any colour
    **dict.fromkeys(("appearance_style", LAST_FRAME, "temporal_style", "overall_consistency"), Range(-1, 1)),
}

Reduction = Literal["single_process", "multi_process"]
"""How the official code goes from videos to a dimension; it differs with the number of processes.

``single_process``: the mean over all frames in subject consistency, background consistency and appearance style, over
videos in the rest. ``multi_process``: subject consistency is a mean over videos, and appearance style one over the last
frame of each, which are the scores ``appearance_style_last_frame``.
"""


def normalised(total: str, dimensions: Mapping[str, Dimension]) -> Rule:
    """The weighted mean of normalised dimensions."""
    whole = math.fsum(d.weight for d in dimensions.values())

    def compute(row: Mapping[str, float]) -> float:
        parts = ((row[name] - d.low) / (d.high - d.low) * d.weight for name, d in dimensions.items())
        return math.fsum(parts) / whole

    return Rule(total, tuple(dimensions), compute)


RULES = (
    normalised("quality", QUALITY),
    normalised("semantic", SEMANTIC),
    weighted("total", {"quality": 4, "semantic": 1}),
)


def pairs(fact: Facts) -> float:
    """Pairs of frames that consistency is a mean over."""
    return max(fact.frames - 1, 0)


def frames(fact: Facts) -> float:
    """Frames that appearance style is a mean over."""
    return fact.frames


def dimensions(scores: Scores, names: Collection[str], reduction: Reduction, official_missing_zero: bool) -> Totals:
    """Each dimension over all videos, as `totals` says."""
    weights = {"background_consistency": pairs}
    columns = {name: name for name in names}
    if reduction == "single_process":
        weights |= {"subject_consistency": pairs, "appearance_style": frames}
    elif "appearance_style" in columns:
        columns["appearance_style"] = LAST_FRAME
    asked = {name for fact in scores.facts.values() for name in fact.scores}
    return {
        dimension: Figure(0.0, 0)
        if official_missing_zero and name not in asked
        else scores.mean(name, weight=weights.get(name))
        for dimension, name in columns.items()
    }


def totals(
    records: Records,
    facts: Mapping[str, Facts],
    *,
    reduction: Reduction = "single_process",
    official_missing_zero: bool = False,
) -> Totals:
    """Total, quality, semantic and the sixteen dimensions, in [0, 1].

    Args:
        records: Of each video, the scores of its prompt's dimensions, means over its frames.
        facts: The videos, with their frames.
        reduction: How videos become a dimension.
        official_missing_zero: Count a dimension that no video has a score of as 0, as the official script does.

    Raises:
        DataError: A score is missing or out of range, or no video has a dimension.
    """
    scores = Scores(records, facts, RANGES, each_all=False)
    parts = dimensions(scores, DIMENSIONS, reduction, official_missing_zero)
    return with_totals(parts, RULES)

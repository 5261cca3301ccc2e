"""VBench-2.0: eighteen dimensions in five groups, plain means all the way.

Source: Vchitect/VBench, `VBench-2.0/scripts/constant.py` and `cal_final_score.py`. Scores and figures are in [0, 1].
"""

from collections.abc import Mapping

from benchmarks.quality.totals.records import SHARE, Facts, Records, Scores, Totals
from benchmarks.quality.totals.rules import plain, with_totals
from benchmarks.quality.totals.vbench import dimensions

GROUPS = {
    "creativity": ("composition", "diversity"),
    "commonsense": ("instance_preservation", "motion_rationality"),
    "controllability": (
        "camera_motion",
        "complex_landscape",
        "complex_plot",
        "dynamic_attribute",
        "dynamic_spatial_relationship",
        "human_interaction",
        "motion_order_understanding",
    ),
    "human_fidelity": ("human_anatomy", "human_clothes", "human_identity"),
    "physics": ("material", "mechanics", "multi_view_consistency", "thermotics"),
}
DIMENSIONS = tuple(name for group in GROUPS.values() for name in group)
RULES = (*(plain(group, names) for group, names in GROUPS.items()), plain("total", tuple(GROUPS)))


def totals(records: Records, facts: Mapping[str, Facts], *, official_missing_zero: bool = False) -> Totals:
    """Total, the five groups and the eighteen dimensions, in [0, 1].

    Args:
        records: Scores of each item: of a video, or of the videos of one prompt in diversity.
        facts: The items.
        official_missing_zero: Count a dimension that no item has a score of as 0, as the official script does.

    Raises:
        DataError: A score is missing or out of range, or no item has a dimension.
    """
    scores = Scores(records, facts, dict.fromkeys(DIMENSIONS, SHARE), each_all=False)
    parts = dimensions(scores, DIMENSIONS, "single_process", official_missing_zero)
    return with_totals(parts, RULES)

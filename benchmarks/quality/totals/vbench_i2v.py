"""VBench-I2V: nine dimensions, half fidelity to the given image, half quality.

Source: Vchitect/VBench, the I2V lists of `scripts/constant.py`. Scores and figures are in [0, 1].
"""

from collections.abc import Mapping

from benchmarks.quality.totals.records import SHARE, Facts, Records, Scores, Totals
from benchmarks.quality.totals.rules import plain, with_totals
from benchmarks.quality.totals.vbench import QUALITY, Dimension, Reduction, dimensions, normalised

I2V = {
    "camera_motion": Dimension(weight=0.1),
    "i2v_subject": QUALITY["subject_consistency"],
    "i2v_background": QUALITY["background_consistency"],
}
I2V_QUALITY = {name: dimension for name, dimension in QUALITY.items() if name != "temporal_flickering"}
DIMENSIONS = I2V | I2V_QUALITY
RULES = (normalised("i2v", I2V), normalised("quality", I2V_QUALITY), plain("total", ("i2v", "quality")))


def totals(
    records: Records,
    facts: Mapping[str, Facts],
    *,
    reduction: Reduction = "single_process",
    official_missing_zero: bool = False,
) -> Totals:
    """Total, quality, I2V score and the nine dimensions, in [0, 1].

    Args:
        records: Of each video, the scores of its dimensions, means over its frames.
        facts: The videos, with their frames.
        reduction: As in VBench 1.0; only subject consistency differs.
        official_missing_zero: Count a dimension that no video has a score of as 0, as the official script does.

    Raises:
        DataError: A score is missing or out of range, or no video has a dimension.
    """
    scores = Scores(records, facts, dict.fromkeys(DIMENSIONS, SHARE), each_all=False)
    parts = dimensions(scores, DIMENSIONS, reduction, official_missing_zero)
    return with_totals(parts, RULES)

"""WISE: world knowledge in images, as verified (right or wrong) and in its older form (three judged scores).

Source: PKU-YuanGroup/WISE, `leadboard.md` for the verified form and `WISE_legacy/README.md` for the older one.
"""

from collections.abc import Mapping

from benchmarks.quality.totals.records import SHARE, Facts, Range, Records, Scores, Totals, mean
from benchmarks.quality.totals.rules import weighted, with_totals

VERIFIED = {"culture": 0.40, "time": 0.12, "space": 0.12, "biology": 0.12, "physics": 0.12, "chemistry": 0.12}
LEGACY = {"culture": 0.4, "time": 0.167, "space": 0.133, "biology": 0.1, "physics": 0.1, "chemistry": 0.1}
CATEGORIES = tuple(VERIFIED)
RULES = (weighted("overall", VERIFIED),)
RULES_LEGACY = (weighted("overall (legacy)", LEGACY),)
JUDGED = ("consistency", "realism", "aesthetic_quality")


def wiscore(row: Mapping[str, float]) -> float:
    """The older score of one image in [0, 1], from three judged scores from 0 to 2."""
    return (0.7 * row["consistency"] + 0.2 * row["realism"] + 0.1 * row["aesthetic_quality"]) / 2


def totals(records: Records, facts: Mapping[str, Facts]) -> Totals:
    """Overall score and the six categories of the verified form, in [0, 1].

    Args:
        records: ``correct`` of each image, 0 or 1.
        facts: The images; their category is one of the six.

    Raises:
        DataError: A score is missing or out of range, a category is unknown or has no image.
    """
    scores = Scores(records, facts, {"correct": SHARE})
    scores.check_categories(CATEGORIES)
    return with_totals({name: scores.mean("correct", name) for name in CATEGORIES}, RULES)


def legacy(records: Records, facts: Mapping[str, Facts]) -> Totals:
    """Overall WiScore and the six categories of the older form, in [0, 1].

    Args:
        records: The three judged scores of each image.
        facts: The images; their category is one of the six.

    Raises:
        DataError: A score is missing or out of range, a category is unknown or has no image.
    """
    scores = Scores(records, facts, dict.fromkeys(JUDGED, Range(0, 2)))
    scores.check_categories(CATEGORIES)
    parts = {name: mean([wiscore(r) for r in scores.rows(JUDGED, name).values()], name) for name in CATEGORIES}
    return with_totals(parts, RULES_LEGACY)

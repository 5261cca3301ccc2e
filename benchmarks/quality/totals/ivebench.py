"""IVEBench: twelve scores in three groups; the short and the long subset are scored apart.

Source: RyanChenYN/IVEBench, `metrics/get_average_score.py`.
"""

from collections.abc import Mapping

from benchmarks.quality.totals.records import SHARE, Facts, Figure, Range, Records, Scores, Totals, had
from benchmarks.quality.totals.rules import Rule, plain, with_totals

GROUPS = {
    "quality": {"SC": 1, "BC": 1, "TF": 1, "MS": 1, "VTSS": 4},
    "compliance": {"OSC": 1, "PSC": 1, "QA": 1, "IS": 3},
    "fidelity": {"SF": 1, "MF": 1, "CF": 3},
}
"""Weights within each group."""

NORMALISED = {"VTSS": (-0.05, 0.1), "IS": (1.0, 5.0), "CF": (1.0, 5.0)}
"""What becomes 0 and 1 before it is weighted; the table shows it as it is."""

COSINE = Range(-1, 1)
RANGES = {
    **dict.fromkeys(("SC", "BC", "TF", "MS"), SHARE),
    "VTSS": Range(),
    "OSC": COSINE,
    "PSC": COSINE._replace(optional=True),  # edits without a target phrase
    "IS": Range(1, 5),
    "QA": Range(0, 1, optional=True),  # edits that do not change a number
    "SF": COSINE,
    "MF": COSINE,
    "CF": Range(1, 5),
}


def _group(total: str, weights: Mapping[str, float]) -> Rule:
    def compute(row: Mapping[str, float]) -> float:
        limits = {name: NORMALISED.get(name, (0.0, 1.0)) for name in weights}
        parts = ((row[name] - limits[name][0]) / (limits[name][1] - limits[name][0]) * w for name, w in weights.items())
        return sum(parts) / sum(weights.values())

    return Rule(total, tuple(weights), compute)


RULES = (*(_group(name, weights) for name, weights in GROUPS.items()), plain("total", tuple(GROUPS)))


def totals(records: Records, facts: Mapping[str, Facts], *, official_missing_dropped: bool = False) -> Totals:
    """Total, the three groups and the twelve scores.

    Args:
        records: Scores of each item of one subset.
        facts: Its items. Without some of the scores there are figures of the others alone.
        official_missing_dropped: As the official script does, take values of -1 and less as missing, which cosines can
            be, and leave what is missing out of the means in silence.

    Raises:
        DataError: A score is missing or out of range, or no item has one of them.
    """
    if official_missing_dropped:
        records = {
            one: {name: value for name, value in record.items() if value is not None and value > -1}
            for one, record in records.items()
        }
    ranges = had(RANGES, facts)
    scores = Scores(records, facts, ranges, drop_missing=official_missing_dropped)
    parts: dict[str, Figure] = {name: scores.mean(name) for name in ranges}
    return with_totals(parts, RULES if parts.keys() == RANGES.keys() else ())

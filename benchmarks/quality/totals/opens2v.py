"""OpenS2V-Eval: subject-to-video, versions 1.1 and 1.0, on the open, single and human domain.

Source: OpenS2V-Nexus, `eval/merge_result.py` and `eval/v1.0_backup/merge_result.py`. Figures are in per cent.
"""

from collections.abc import Mapping
from typing import Literal

from benchmarks.quality.totals.records import Facts, Range, Records, Scores, Totals, had, mean, scaled
from benchmarks.quality.totals.rules import Rule, weighted, with_totals

Version = Literal["v1.1", "v1.0"]
Domain = Literal["open", "single", "human"]

LIMITS: dict[str, tuple[float, float]] = {
    "aesthetics": (4, 7),
    "motion_smoothness": (0, 1),
    "motion_amplitude": (0, 1),
    "face_sim": (-1, 1),
    "gme_score": (-1, 1),
    "nexus_score": (0, 0.05),
    "natural_score": (1, 5),
}
"""What a score is clipped to, item by item."""

RANGES = {
    "aesthetics": Range(),
    "motion_smoothness": Range(0, 1),
    "motion_amplitude": Range(0),
    "face_sim": Range(-1, 1, optional=True),  # no frame shows a face
    "gme_score": Range(-1, 1),
    "nexus_score": Range(0),
    "natural_score": Range(1, 5),
}

_V11 = {
    "aesthetics": 0.16,
    "motion_smoothness": 0.06,
    "motion_amplitude": 0.02,
    "face_sim": 0.20,
    "gme_score": 0.12,
    "nexus_score": 0.20,
    "natural_score": 0.24,
}
_V11_HUMAN = {
    "aesthetics": 0.18,
    "motion_smoothness": 0.09,
    "motion_amplitude": 0.03,
    "face_sim": 0.25,
    "gme_score": 0.15,
    "natural_score": 0.30,
}
_V10 = {
    "aesthetics": 0.12,
    "motion_amplitude": 0.12,
    "face_sim": 0.20,
    "gme_score": 0.12,
    "nexus_score": 0.20,
    "natural_score": 0.24,
}
_V10_HUMAN = {
    "aesthetics": 0.15,
    "motion_amplitude": 0.15,
    "face_sim": 0.25,
    "gme_score": 0.15,
    "natural_score": 0.30,
}
WEIGHTS: dict[tuple[Version, Domain], dict[str, float]] = {
    ("v1.1", "open"): _V11,
    ("v1.1", "single"): _V11,
    ("v1.1", "human"): _V11_HUMAN,
    ("v1.0", "open"): _V10,
    ("v1.0", "single"): _V10,
    ("v1.0", "human"): _V10_HUMAN,
}
"""Weights of a total, which sum to 1; version 1.0 has the amplitude alone under the name of motion."""


def rules(version: Version, domain: Domain) -> tuple[Rule, ...]:
    """How the total of one version and domain follows from its parts."""
    return (weighted("total", WEIGHTS[version, domain]),)


def totals(
    records: Records, facts: Mapping[str, Facts], *, version: Version = "v1.1", domain: Domain = "open"
) -> Totals:
    """Total and its parts, in per cent; each part is a mean over items that is normalised after it was taken.

    Args:
        records: Scores of each item as they were measured: aesthetics about 1 to 10, natural score 1 to 5 (the mean of
            three judgements), all others as shares or cosines. An item of nexus score 0 is left out of that mean.
        facts: The items; only those with a person's reference have a face similarity. Without some of the scores there
            are figures of the others alone.
        version: Of the benchmark.
        domain: Which of its three sets the items are.

    Raises:
        DataError: A score is missing or out of range, or no item has one of the parts.
    """
    weights = WEIGHTS[version, domain]
    ranges = {name: allowed if name in weights else allowed._replace(optional=True) for name, allowed in RANGES.items()}
    ranges = had(ranges, facts)
    scores = Scores(records, facts, ranges)
    parts: Totals = {}
    for name in (name for name in weights if name in ranges):
        low, high = LIMITS[name]
        found = [row[name] for row in scores.rows((name,)).values() if name != "nexus_score" or row[name]]
        least = 0.0 if low < 0 else low  # a cosine is clipped above alone, and 0 of it is 0
        figure = mean([min(max(value, low), high) for value in found], name)
        parts[name] = scaled(figure._replace(value=figure.value - least), 100 / (high - least))
    return with_totals(parts, rules(version, domain) if parts.keys() == weights.keys() else ())

"""ImgEdit-Bench: three judged scores from 1 to 5, rounded twice on the way to nine types.

Source: PKU-YuanGroup/ImgEdit, `Benchmark/Basic/step1_get_avgscore.py` and `step2_typescore.py`.
"""

from collections.abc import Mapping

from benchmarks.quality.totals.records import Facts, Figure, Range, Records, Scores, Totals, mean
from benchmarks.quality.totals.rules import plain, with_totals

TYPES = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")
SCORES = ("first", "second", "third")
"""Each type has names of its own for the three questions; they count alike."""

RULES = (plain("overall", TYPES),)


def item(row: Mapping[str, float]) -> float:
    """Score of one item, rounded to two decimals as the official script does."""
    return round(sum(row[name] for name in SCORES) / len(SCORES), 2)


def totals(records: Records, facts: Mapping[str, Facts], *, official_missing_dropped: bool = False) -> Totals:
    """Overall score and the nine types, from 1 to 5; types are rounded to two decimals before they are averaged.

    Args:
        records: The three judged scores of each item.
        facts: The items; their category is the type.
        official_missing_dropped: Leave items without answers out of the means in silence, as the official script does.

    Raises:
        DataError: A score is missing or out of range, a type is unknown or has no item.
    """
    scores = Scores(records, facts, dict.fromkeys(SCORES, Range(1, 5)), drop_missing=official_missing_dropped)
    scores.check_categories(TYPES)
    parts: dict[str, Figure] = {}
    for kind in TYPES:
        figure = mean([item(row) for row in scores.rows(SCORES, kind).values()], kind)
        parts[kind] = figure._replace(value=round(figure.value, 2))
    return with_totals(parts, RULES)

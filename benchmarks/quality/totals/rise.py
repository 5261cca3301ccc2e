"""RISEBench: reasoning edits, as a score and as the share of items that are solved.

Source: PhoenixZ810/RISEBench, `gpt_eval.py`. The sizes of the categories follow from the published rows.
"""

from collections.abc import Mapping

from benchmarks.quality.totals.records import Facts, Range, Records, Scores, Totals, mean, scaled
from benchmarks.quality.totals.rules import weighted
from bernini.errors import DataError

CATEGORIES = {"temporal": 85, "causal": 90, "spatial": 100, "logical": 85}
"""Items of each category."""

RULES = (weighted("overall", CATEGORIES),)
"""Of the accuracies, which is what is published."""

WEIGHTS = {"consistency": 0.3, "reasoning": 0.5, "plausibility": 0.2}
WEIGHTS_FREE = {"reasoning": 0.8, "plausibility": 0.2}
WEIGHTS_LOGICAL = {"consistency": 0.3, "reasoning": 0.7}


def score(row: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Score of one item from 1 to 5: halved, if not below 1, where the reasoning is all wrong."""
    value = sum(row[name] * weight for name, weight in weights.items())
    return max(value * 0.5, 1.0) if row["reasoning"] == 1 else value


def totals(records: Records, facts: Mapping[str, Facts], *, official_free: bool = False) -> Totals:
    """Accuracy and score, over all items and by category, in per cent.

    Args:
        records: Judged scores of each item from 1 to 5: consistency, reasoning and plausibility; no plausibility of
            logical items, and no consistency of those that are free to differ from their source.
        facts: The items, with the names of their scores; their category is one of the four.
        official_free: Treat consistency as the official script's table of records does. If any item is free of it, the
            flag counts as set for all but logical items, so that none is scored for consistency. And a free item is
            never solved.

    Raises:
        DataError: A score is missing or out of range, or a category is unknown or has no item.
    """
    scores = Scores(records, facts, dict.fromkeys(WEIGHTS, Range(1, 5)), each_all=False)
    scores.check_categories(CATEGORIES)
    any_free = any("consistency" not in fact.scores for fact in facts.values())
    solved: dict[str, list[float]] = {name: [] for name in CATEGORIES}
    valued: dict[str, list[float]] = {name: [] for name in CATEGORIES}
    for one, fact in facts.items():
        free = "consistency" not in fact.scores
        weights = _weights(fact.category, free)
        if set(weights) != set(fact.scores):
            raise DataError(f"item {one!r} is not asked for {', '.join(weights)}", why=f"it is {fact.category}")
        row = scores.row(one)
        valued[fact.category].append(score(row, _weights(fact.category, free or (official_free and any_free))))
        solved[fact.category].append(float(all(value == 5 for value in row.values()) and not (free and official_free)))
    found: Totals = {}
    for column, values, zero, factor in (("accuracy", solved, 0, 100), ("score", valued, 1, 25)):
        for name, of in {"": [v for part in values.values() for v in part], **values}.items():
            figure = mean(of, f"{column} of {name}")
            key = f"{column} ({name})" if name else column
            found[key] = scaled(figure._replace(value=figure.value - zero), factor)
    return found


def accuracies(records: Records, facts: Mapping[str, Facts]) -> Totals:
    """The accuracies of `totals` by the names that printed tables give them."""
    found = totals(records, facts)
    return {"overall": found["accuracy"], **{name: found[f"accuracy ({name})"] for name in CATEGORIES}}


def _weights(category: str, free: bool) -> Mapping[str, float]:
    return WEIGHTS_LOGICAL if category == "logical" else WEIGHTS_FREE if free else WEIGHTS

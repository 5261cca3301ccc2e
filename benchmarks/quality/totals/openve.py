"""OpenVE-Bench: editing judged from 1 to 5 by three questions, averaged within types and then over types.

"Overall" is over 5, 6 or all 8 types, depending on the paper, so the types are part of its name. Source: the evaluation
in showlab/Kiwi-Edit (`eval_openve_gemini.py`), which averages five.
"""

from collections.abc import Mapping, Sequence

from benchmarks.quality.totals.records import Facts, Range, Records, Scores, Totals, mean
from benchmarks.quality.totals.rules import Rule, plain, with_totals

SCORES = ("instruction_compliance", "consistency", "visual_quality")
FIVE = ("global_style", "background_change", "local_change", "local_remove", "local_add")
SIX = (*FIVE, "subtitle_edit")
EIGHT = (*SIX, "camera_edit", "creative_edit")


def overall(types: Sequence[str]) -> str:
    """Column of the mean over some types: by their number where a paper has used them, else by their names."""
    named = {frozenset(known): f"overall ({len(known)} types)" for known in (FIVE, SIX, EIGHT)}
    return named.get(frozenset(types), f"overall ({', '.join(sorted(types))})")


def rules(types: Sequence[str]) -> tuple[Rule, ...]:
    """How the overall figure follows from the types."""
    return (plain(overall(types), tuple(types)),)


def totals(
    records: Records,
    facts: Mapping[str, Facts],
    *,
    types: Sequence[str] = EIGHT,
    official_missing_dropped: bool = False,
) -> Totals:
    """Overall figure and each of its types, from 1 to 5.

    Args:
        records: The three scores of each item.
        facts: The items; their category is the type of edit. Those of other types are checked and left out.
        types: Types that the overall figure is over.
        official_missing_dropped: Leave items without answers out of the means in silence, as the official script does.

    Raises:
        DataError: A score is missing or out of range, a type is unknown or has no item.
    """
    scores = Scores(records, facts, dict.fromkeys(SCORES, Range(1, 5)), drop_missing=official_missing_dropped)
    scores.check_categories(EIGHT)
    parts = {}
    for kind in types:
        rows = scores.rows(SCORES, kind)
        parts[kind] = mean([value for row in rows.values() for value in row.values()], kind)._replace(n=len(rows))
    return with_totals(parts, rules(types))

"""KRIS-Bench: three or four judged scores from 1 to 5 an item, over what kind of knowledge an edit takes.

Source: the port in EvolvingLMMs-Lab/lmms-eval, `tasks/kris_bench/utils.py`: every mean is over items.
"""

from collections.abc import Mapping

from benchmarks.quality.totals.records import Facts, Range, Records, Scores, Totals, mean, scaled
from bernini.errors import DataError

GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "factual": {
        "attribute_perception": (
            "count_change",
            "color_change",
            "size_adjustment",
            "part_completion",
            "anomaly_correction",
        ),
        "spatial_perception": ("position_movement", "viewpoint_change"),
        "temporal_prediction": ("temporal_prediction",),
    },
    "conceptual": {
        "social_science": ("practical_knowledge", "humanities"),
        "natural_science": ("biology", "chemistry", "geography", "mathematics", "medicine", "physics"),
    },
    "procedural": {
        "logical_reasoning": ("abstract_reasoning", "rule-based_reasoning"),
        "instruction_decomposition": ("multi-instruction_execution", "multi-element_composition"),
    },
}
KNOWLEDGE = frozenset(
    (*(name for group in GROUPS["conceptual"].values() for name in group), *GROUPS["procedural"]["logical_reasoning"])
)
"""Categories that are judged for knowledge, too."""

SCORES = ("consistency", "instruction", "quality", "knowledge")


def asked(category: str) -> tuple[str, ...]:
    """Scores of an item of a category."""
    return SCORES if category in KNOWLEDGE else SCORES[:3]


def totals(records: Records, facts: Mapping[str, Facts]) -> Totals:
    """Mean over items of their mean scores: all, by kind of knowledge and by group; then each score; in per cent.

    Args:
        records: Judged scores of each item from 1 to 5.
        facts: The items; their category is one of the 20.

    Raises:
        DataError: A score is missing or out of range, a category is unknown, or a group has no item.
    """
    scores = Scores(records, facts, dict.fromkeys(SCORES, Range(1, 5)), each_all=False)
    scores.check_categories([name for groups in GROUPS.values() for names in groups.values() for name in names])
    for one, fact in facts.items():
        if set(fact.scores) != set(asked(fact.category)):
            raise DataError(f"item {one!r} is not asked for {', '.join(asked(fact.category))}", why="of its category")
    means = {one: mean(list(scores.row(one).values()), "scores").value for one in facts}
    columns = {"overall": list(means)}
    for kind, groups in GROUPS.items():
        members = {group: [one for one, fact in facts.items() if fact.category in groups[group]] for group in groups}
        columns[kind] = [one for group in members.values() for one in group]
        columns |= {f"{kind} ({group})": ones for group, ones in members.items()}
    found = {column: mean([means[one] for one in ones], column) for column, ones in columns.items()}
    found |= {name: scores.mean(name) for name in SCORES}
    return {column: scaled(figure._replace(value=figure.value - 1), 25) for column, figure in found.items()}

"""GenEval: the share of right images within six tasks, then the plain mean over tasks.

Source: djghosh13/geneval, `evaluation/summary_scores.py`.
"""

from collections.abc import Mapping

from benchmarks.quality.totals.records import SHARE, Facts, Records, Scores, Totals
from benchmarks.quality.totals.rules import plain, with_totals

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RULES = (plain("overall", TASKS),)


def totals(records: Records, facts: Mapping[str, Facts]) -> Totals:
    """Overall score and the six tasks, in [0, 1].

    Args:
        records: ``correct`` of each image, 0 or 1; the four images of a prompt are items of their own.
        facts: The images; their category is the task.

    Raises:
        DataError: A score is missing or out of range, a task is unknown or has no image.
    """
    scores = Scores(records, facts, {"correct": SHARE})
    scores.check_categories(TASKS)
    return with_totals({task: scores.mean("correct", task) for task in TASKS}, RULES)

"""DPG-Bench: questions that depend on each other, over the four crops of each image.

Source: TencentQQGYLab/ELLA, `dpg_bench/compute_dpg_bench.py`.
"""

from collections.abc import Mapping, Sequence

from benchmarks.quality.totals.records import SHARE, Facts, Records, Scores, Totals, mean, scaled
from bernini.errors import DataError

Answers = Mapping[int, bool]
"""Whether the answer to a question is yes, by its number; in the order of the questions."""


def item(crops: Sequence[Answers], parents: Mapping[int, Sequence[int]]) -> float:
    """Score of one image in [0, 1]: the share of questions that hold, with those that they depend on, over its crops.

    A question whose parent does not hold does not hold. Parents are looked at in the order of the questions, so that
    the failure of one reaches its grandchildren where each parent comes before its children.

    Args:
        crops: Answers for each crop.
        parents: Numbers of the questions that each one depends on; 0 is none.

    Raises:
        DataError: A question depends on one that does not exist, or a crop lacks an answer.
    """
    return mean([_crop(answers, parents) for answers in crops], "crops").value


def _crop(answers: Answers, parents: Mapping[int, Sequence[int]]) -> float:
    if missing := sorted(parents.keys() ^ answers.keys()):
        raise DataError(f"question {missing[0]} has no answer or no place in the list of questions")
    held = dict(answers)
    for number, needed in parents.items():
        if unknown := [parent for parent in needed if parent and parent not in held]:
            raise DataError(f"question {number} depends on question {unknown[0]}, which does not exist")
        held[number] &= all(held[parent] for parent in needed if parent)
    return mean([float(value) for value in held.values()], "questions").value


def totals(records: Records, facts: Mapping[str, Facts]) -> Totals:
    """The overall score, in per cent.

    Args:
        records: ``score`` of each image, as `item` gives it.
        facts: The images.

    Raises:
        DataError: A score is missing or out of range.
    """
    return {"overall": scaled(Scores(records, facts, {"score": SHARE}).mean("score"), 100)}


def official_categories(last_crops: Mapping[str, Answers], categories: Mapping[str, Mapping[int, str]]) -> Totals:
    """Scores by category in per cent, as the official script has them: of the last crop alone, parents ignored.

    Args:
        last_crops: Answers for the last crop of each image.
        categories: Of each question of each image, e.g. ``entity - whole``; what precedes the dash is a column, too.

    Raises:
        DataError: A question has no category.
    """
    found: dict[str, list[float]] = {}
    for one, answers in last_crops.items():
        for number, held in answers.items():
            category = categories.get(one, {}).get(number)
            if not category:
                raise DataError(f"question {number} of image {one!r} has no category")
            for column in dict.fromkeys((category.split("-")[0].strip(), category)):
                found.setdefault(column, []).append(float(held))
    return {column: scaled(mean(values, column), 100) for column, values in sorted(found.items())}

"""FiVE and FiVE-Acc: means within six types of edits, then the plain mean over types, whatever their sizes.

Source: FiVE-Bench, `evaluation/evaluate.py` and `results/avg_metrics_in_csv.py`.
"""

from collections.abc import Mapping

from benchmarks.quality.totals.records import SHARE, Facts, Figure, Range, Records, Scores, Totals, had, mean, scaled
from benchmarks.quality.totals.rules import Rule, plain
from bernini.errors import DataError

TYPES = ("rigid_replace", "non_rigid_replace", "color", "material", "add", "remove")

PRINTED = {
    "dist_e3": ("structure_distance", 1e3),
    "psnr": ("psnr_unedit_part", 1.0),
    "lpips_e3": ("lpips_unedit_part", 1e3),
    "mse_e4": ("mse_unedit_part", 1e4),
    "ssim_e2": ("ssim_unedit_part", 1e2),
    "clip": ("clip_similarity_target_image", 1.0),
    "clip_edit": ("clip_similarity_target_image_edit_part", 1.0),
    "niqe": ("niqe_target_image", 1.0),
    "motion_e2": ("motion_fidelity_score", 1e2),
}
"""Column, score and factor of the conventional table."""

CONVENTIONAL = {
    "structure_distance": Range(0),
    "psnr_unedit_part": Range(optional=True),  # the mask may cover everything
    "lpips_unedit_part": Range(0, optional=True),
    "mse_unedit_part": Range(0, optional=True),
    "ssim_unedit_part": Range(-1, 1, optional=True),
    "clip_similarity_target_image": Range(),
    "clip_similarity_target_image_edit_part": Range(optional=True),  # the mask may be empty
    "niqe_target_image": Range(),
    "motion_fidelity_score": Range(-1, 1, optional=True),  # where nothing moves, directions do not exist
}

ACCURACY = ("yn", "mc", "union", "inter")
RULES = (
    Rule("union", ("yn", "mc", "inter"), lambda row: row["yn"] + row["mc"] - row["inter"]),
    plain("five_acc", ACCURACY),
)


def accuracy(source: str | None, target: str, choice: str) -> dict[str, float]:
    """The four parts of an item's FiVE-Acc from its answers, each 0 or 1.

    Args:
        source: Answer to whether the source's content is seen; none where that is not asked.
        target: Answer to whether the target's content is seen.
        choice: Answer to the multiple choice question, whose right answer is always b.
    """
    yes_no = target.strip()[:3].lower() == "yes" and (source is None or source.strip()[:2].lower() == "no")
    return parts(yes_no, choice.strip()[:1].lower() == "b")


def parts(yes_no: bool, choice: bool) -> dict[str, float]:
    """The four parts of an item's FiVE-Acc, each 0 or 1.

    Args:
        yes_no: Whether its yes-no questions, one or two, are answered as for the target.
        choice: Whether the target is chosen.
    """
    found = {"yn": yes_no, "mc": choice, "union": yes_no or choice, "inter": yes_no and choice}
    return {name: float(right) for name, right in found.items()}


def conventional(records: Records, facts: Mapping[str, Facts], *, official_missing_dropped: bool = False) -> Totals:
    """The nine conventional figures in the paper's units.

    Args:
        records: Scores of each item, means over its frames.
        facts: The items; their category is the type of edit. Figures are made of the scores that they have.
        official_missing_dropped: Leave what is missing out of the means in silence, as the official scripts do.

    Raises:
        DataError: A score is missing or out of range, a type is unknown or has no item.
    """
    ranges = had(CONVENTIONAL, facts)
    scores = Scores(records, facts, ranges, drop_missing=official_missing_dropped)
    return {c: scaled(_over_types(scores, name), factor) for c, (name, factor) in PRINTED.items() if name in ranges}


def accuracies(records: Records, facts: Mapping[str, Facts], *, official_missing_dropped: bool = False) -> Totals:
    """FiVE-Acc and its four parts, in per cent.

    Args:
        records: The parts of each item, each 0 or 1.
        facts: The items; their category is the type of edit.
        official_missing_dropped: Leave items without answers out of the means in silence, as the official scripts do.

    Raises:
        DataError: A score is missing or out of range, a type is unknown or has no item, or the parts of an item
            contradict each other.
    """
    scores = Scores(records, facts, dict.fromkeys(ACCURACY, SHARE), drop_missing=official_missing_dropped)
    for one, row in scores.rows(ACCURACY).items():
        if (row["union"], row["inter"]) != (max(row["yn"], row["mc"]), min(row["yn"], row["mc"])):
            raise DataError(
                f"the answers of item {one!r} contradict each other: {row}",
                why="union and inter follow from yn and mc, and union + inter = yn + mc",
                fix="see whether the columns of its row have shifted",
            )
    figures = {name: scaled(_over_types(scores, name), 100) for name in ACCURACY}
    whole = mean([figure.value for figure in figures.values()], "five_acc")
    return {"five_acc": whole._replace(n=min(figure.n for figure in figures.values())), **figures}


def _over_types(scores: Scores, name: str) -> Figure:
    scores.check_categories(TYPES)
    figures = [scores.mean(name, kind) for kind in TYPES]
    return mean([figure.value for figure in figures], name)._replace(n=sum(figure.n for figure in figures))

"""EditVerseBench: six plain means, of which none is a total. Source: adobe-research/EditVerse, its README."""

from collections.abc import Mapping

from benchmarks.quality.totals.records import Facts, Range, Records, Scores, Totals, had, scaled

RANGES = {
    "editing_quality": Range(0, 9),
    "pick": Range(),
    "frame_text": Range(-100, 100),
    "video_text": Range(-100, 100),
    "clip_tc": Range(0, 1),
    "dino_tc": Range(0, 1),
}
PRINTED = {"clip_tc": 100.0, "dino_tc": 100.0}


def totals(records: Records, facts: Mapping[str, Facts]) -> Totals:
    """The six figures as the benchmark's table prints them: both temporal consistencies in per cent.

    Args:
        records: Scores of each item: editing quality is the mean of the judged frames' 0 to 9.
        facts: The items; figures are made of the scores that they have.

    Raises:
        DataError: A score is missing or out of range.
    """
    ranges = had(RANGES, facts)
    scores = Scores(records, facts, ranges)
    return {name: scaled(scores.mean(name), PRINTED.get(name, 1.0)) for name in ranges}

"""The part of the stage `score` that asks a judge; it goes on where it was broken off, and asks nothing twice."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.quality.folder import ANSWERS, JUDGE, RunFolder, reason
from benchmarks.quality.inquiries.base import Inquiry
from benchmarks.quality.interface import Item
from benchmarks.quality.judging.answers import Answers
from benchmarks.quality.judging.asking import ask, settings
from benchmarks.quality.judging.judged import Cap, Judged
from benchmarks.quality.judging.question import Judge, Question
from bernini.errors import ConfigError, DataError
from bernini.files import replacing


def score_by_judge(
    inquiry: Inquiry[Any],
    items: Sequence[Item],
    folder: RunFolder,
    judge: Judge,
    *,
    repeats: int = 1,
    cap: Cap | None = None,
    seconds: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Judged:
    """Have outputs judged, and note the scores, or why there are none.

    Args:
        inquiry: What is asked.
        items: The items whose outputs are asked about, one rank's or all.
        folder: Where outputs lie; answers and settings go to ``judge/``, scores to ``scores/``.
        judge: Who answers.
        repeats: How often each question is asked.
        cap: The cap rule, if the rubric has one.
        seconds: After these nothing more is asked, see `ask`.
        progress: Called with the number of items that are done, or as many as the questions that are done amount to.

    Raises:
        ConfigError: The run's outputs were judged with other settings.
        UnwelcomeError: The judge answers nobody. What was answered is kept.
    """
    planned = Judged([], settings(judge, [inquiry.version], repeats), cap)
    start(folder, {"column": planned.column, "scores": list(inquiry.scores), "settings": planned.settings})
    questions: list[Question] = []
    unasked: list[tuple[Item, str]] = []
    for item in items:
        if set(inquiry.scores).isdisjoint(item.metrics):
            continue
        try:
            questions += inquiry.questions(item, folder.output(inquiry.benchmark, item))
        except DataError as error:  # noted: the others can still be asked about
            unasked.append((item, reason(error)))
    answers = Answers(folder.root / ANSWERS)
    part = len(items) / max(1, len(questions))
    asked = ask(
        judge,
        questions,
        answers,
        repeats=repeats,
        cap=cap,
        seconds=seconds,
        progress=lambda done: progress(round(done * part)),
    )
    judged = inquiry.settle(asked)
    for score in inquiry.scores:
        known = folder.scores(score).rows()
        failed = ({"id": i.id, "status": "failed", "failed": why} for i, why in unasked if score in i.metrics)
        rows = [*judged.rows(score), *failed]
        if new := [row for row in rows if known.get(row["id"]) != row]:
            folder.scores(score).append(new)
    return judged


def start(folder: RunFolder, told: dict[str, Any]) -> None:
    """Note who judges, or see that it was the same before.

    Raises:
        ConfigError: It was not.
    """
    told = json.loads(json.dumps(told))
    before = folder.judge()
    if before is not None and before != told:
        raise ConfigError(
            f"the run was judged as {before['column']}, and would now be as {told['column']}",
            where=str(folder.root / JUDGE),
            why="scores of two judges, rubrics or rules would stand in one column",
            fix="copy the folder without judge/ and the judge's scores, and score the copy",
        )
    if before is None:
        with replacing(folder.root / JUDGE) as temporary:
            temporary.write_text(json.dumps(told, indent=2) + "\n")

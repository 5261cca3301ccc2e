"""Asks a judge a set of questions, each once as long as its answer is kept; it goes on where it was broken off."""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.folder import reason
from benchmarks.quality.judging.answers import Answers
from benchmarks.quality.judging.forms import Unreadable
from benchmarks.quality.judging.judged import Cap, Judged, Status, Verdict
from benchmarks.quality.judging.question import Judge, Prompt, Question, address
from bernini.chat import Completion, UnwelcomeError
from bernini.errors import ConfigError, DataError, ServiceError


def ask(
    judge: Judge,
    questions: Sequence[Question],
    answers: Answers,
    *,
    repeats: int = 1,
    cap: Cap | None = None,
    offline: bool = False,
    give_up: int = 16,
    seconds: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Judged:
    """Have questions answered, and read scores out of the answers.

    An answer that cannot be read is followed by one reminder of the form; what is said to that counts, or the question
    is unparsed, for good. A question without an answer is failed, and asked when this is called again.

    Args:
        judge: Who answers.
        questions: What is asked.
        answers: Where answers are kept, and found.
        repeats: How often each question is asked.
        cap: The rubric's cap rule, if it has one.
        offline: Ask nothing: read the answers that are there, and count the others as failed.
        give_up: Askings in a row without an answer, after which no more are tried and the rest count as failed.
        seconds: After these no question is asked any more, and what has no answer counts as failed; what is on the way
            is waited for. Null asks on.
        progress: Called with the number of questions that are done.

    Raises:
        ConfigError: Two questions have one key, there are no repeats, or the cap names scores that nobody asks for.
        UnwelcomeError: The judge answers nobody: key, url or model are wrong. What was answered is kept.
    """
    key, times = Counter(question.key for question in questions).most_common(1)[0] if questions else ("", 0)
    if times > 1:
        raise ConfigError(f"{times} questions have the key {key!r}", fix="give each a key of its own")
    if repeats < 1:
        raise ConfigError(f"questions are to be asked {repeats} times", fix="ask once at least")
    until = math.inf if seconds is None else time.monotonic() + seconds
    asker = _Asker(judge, answers, repeats, offline, give_up, until)
    pool = ThreadPoolExecutor(judge.workers)
    try:
        asked = [pool.submit(asker.ask, question) for question in questions]
        for done, future in enumerate(as_completed(asked), 1):
            future.result()
            progress(done)
    finally:
        pool.shutdown(cancel_futures=True)
    verdicts = [verdict for future in asked for verdict in future.result()]
    if len(models := {said.model for verdict in verdicts for said in verdict.said}) > 1:
        told = ", ".join(sorted(model or "one without a name" for model in models))
        warnings.warn(f"the server answered as several models, whose scores stand together: {told}", stacklevel=2)
    versions = sorted({question.version for question in questions})
    return Judged(verdicts, settings(judge, versions, repeats), cap)


def settings(judge: Judge, versions: Sequence[str], repeats: int) -> dict[str, Any]:
    """What decides the scores of a judge's answers, plain JSON.

    Args:
        judge: Who answers.
        versions: Of all questions, each one once, in order.
        repeats: How often each question is asked.
    """
    return {"name": judge.name, "judge": dict(judge.identity()), "versions": list(versions), "repeats": repeats}


@dataclass
class _Asker:
    judge: Judge
    answers: Answers
    repeats: int
    offline: bool
    give_up: int
    until: float
    failed_in_row: int = 0  # threads may miscount by one or two, which does not matter

    def ask(self, question: Question) -> list[Verdict]:
        """Verdicts of all repeats; what is shown is read once for them."""
        try:
            prompt = question.prompt()
        except (DataError, OSError) as error:  # noted: other questions can still be asked
            return [_verdict(question, repeat, "failed", reason(error), []) for repeat in range(self.repeats)]
        return [self._once(question, prompt, repeat) for repeat in range(self.repeats)]

    def _once(self, question: Question, prompt: Prompt, repeat: int) -> Verdict:
        said: list[Completion] = []
        why = ""
        for turn in range(2):
            try:
                said.append(self._answer(question, prompt, repeat, turn))
            except UnwelcomeError:
                raise
            except ServiceError as error:
                return _verdict(question, repeat, "failed", reason(error), said)
            try:
                return _verdict(question, repeat, "scored", "", said, _read(question, said[-1]))
            except Unreadable as error:
                why = str(error)
            prompt = prompt.after(said[-1].text, question.form.reminder)
        return _verdict(question, repeat, "unparsed", why, said)

    def _answer(self, question: Question, prompt: Prompt, repeat: int, turn: int) -> Completion:
        """The answer that is kept, or a new one, which then is."""
        place = address(self.judge, prompt, question.version, repeat)
        with self.answers.asking(place) as known:
            if known is not None:
                return known
            if self.offline:
                raise ServiceError("there is no answer yet, and none was asked for")
            if self.failed_in_row >= self.give_up:
                raise ServiceError(f"not asked, after {self.give_up} times in a row without an answer")
            if time.monotonic() > self.until:
                raise ServiceError("not asked: the time for it was over")
            try:
                completion = self.judge.answer(prompt, repeat, question.key)
            except ServiceError:
                self.failed_in_row += 1
                raise
            self.failed_in_row = 0
            about = {"question": question.key, "item": question.item, "repeat": repeat, "turn": turn}
            self.answers.add(place, completion, {**about, "judge": self.judge.name})
        return completion


def _read(question: Question, said: Completion) -> dict[str, float]:
    if said.is_cut:
        raise Unreadable(f"the answer was cut ({said.finish})")
    return question.form.read(said.text)


def _verdict(
    question: Question,
    repeat: int,
    status: Status,
    why: str,
    said: Sequence[Completion],
    scores: dict[str, float] | None = None,
) -> Verdict:
    form = question.form
    return Verdict(
        question=question.key,
        item=question.item,
        repeat=repeat,
        names=form.names,
        low=form.low,
        high=form.high,
        status=status,
        scores=scores or {},
        why=why,
        said=tuple(said),
    )

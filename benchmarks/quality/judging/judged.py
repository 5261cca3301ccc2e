"""What came of asking: scores by item and name, what is missing, and how far the figures can be trusted.

Pure functions of verdicts; nothing here asks, reads or writes.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from benchmarks.quality.folder import Row, digest
from bernini.chat import Completion
from bernini.errors import ConfigError, DataError

Status = Literal["scored", "unparsed", "failed"]


@dataclass(frozen=True)
class Verdict:
    """What came of asking one question once.

    Attributes:
        question: Its key.
        item: Id of the item that it is about.
        repeat: Which asking, from 0.
        names: Scores that were asked for.
        low: Least value of each.
        high: Largest.
        status: ``scored``; ``unparsed``, if neither the answer nor the one after a reminder could be read; ``failed``,
            if there was no answer or nothing to show.
        scores: By name; empty unless scored.
        why: What went wrong, in one line.
        said: Answers as they came, the one after a reminder last.
    """

    question: str
    item: str
    repeat: int
    names: tuple[str, ...]
    low: float
    high: float
    status: Status
    scores: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    said: tuple[Completion, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """What was said."""
        return tuple(completion.text for completion in self.said)


@dataclass(frozen=True)
class Cap:
    """A rule that rubrics ask for: no score goes above a certain one of the same answer.

    Attributes:
        by: That score.
        on: Those that it caps.
        rule: ``off`` takes scores as they are, as official code does; ``enforce`` lowers them. Violations are counted
            either way.
    """

    by: str
    on: tuple[str, ...]
    rule: Literal["off", "enforce"] = "off"

    def __post_init__(self) -> None:
        if self.rule not in ("off", "enforce") or not self.on or self.by in self.on:
            raise ConfigError(f"cap rule {self.rule!r} of {self.by} on {self.on}", fix="rule is off or enforce")

    def broken(self, verdict: Verdict) -> list[str]:
        """Scores of an answer that are above what caps them."""
        scores = verdict.scores
        return [name for name in self.on if name in scores and self.by in scores and scores[name] > scores[self.by]]

    def apply(self, verdict: Verdict) -> Verdict:
        """The verdict as the rule counts it."""
        if self.rule == "off":
            return verdict
        lowered = {name: verdict.scores[self.by] for name in self.broken(verdict)}
        return replace(verdict, scores={**verdict.scores, **lowered})


class Record(NamedTuple):
    """A score of an item: the mean over its questions and their repeats, if all of them are there.

    Attributes:
        item: Id.
        score: Name.
        status: The worst of the verdicts that it takes.
        value: None unless scored.
        low: What it is at least, whatever missing answers would say.
        high: What it is at most.
        repeats: Mean over the questions of each repeat; None where one is missing.
        why: Why it is not scored.
    """

    item: str
    score: str
    status: Status
    value: float | None
    low: float
    high: float
    repeats: tuple[float | None, ...]
    why: str

    @property
    def spread(self) -> float | None:
        """Standard deviation (n - 1) over repeats; none where there are fewer than two."""
        found = [value for value in self.repeats if value is not None]
        return statistics.stdev(found) if len(found) > 1 else None


class Bounds(NamedTuple):
    """A mean over items, and what it would be if all that is missing were as bad or as good as can be."""

    mean: float | None
    low: float
    high: float
    n: int
    of: int


class Judged:
    """The verdicts on a set of questions.

    Args:
        verdicts: One for each question and repeat.
        settings: What decides them: judge, versions of the questions, repeats; plain JSON.
        cap: Cap rule, where the rubric has one.

    Raises:
        ConfigError: The cap rule names a score that nobody asked for.
    """

    def __init__(self, verdicts: Sequence[Verdict], settings: Mapping[str, Any], cap: Cap | None = None) -> None:
        self.raw, self.cap = tuple(verdicts), cap
        asked = {name for v in verdicts for name in v.names}
        if cap and asked and not {cap.by, *cap.on} <= asked:
            why = f"the questions ask for {', '.join(sorted(asked))}"
            raise ConfigError(f"the cap of {', '.join(cap.on)} by {cap.by} caps nothing", why=why)
        self.verdicts = tuple(cap.apply(v) for v in verdicts) if cap else self.raw
        rule = {"by": cap.by, "on": list(cap.on), "rule": cap.rule} if cap else None
        self.settings = {**settings, "cap": rule}

    @property
    def column(self) -> str:
        """Head of the column that these scores may stand in: two settings never share one."""
        return f"{self.settings['name']} #{digest(self.settings)[:8]}"

    def violations(self) -> dict[str, int]:
        """Answers in which a score is above what caps it, by score, whether or not the rule was enforced."""
        found = Counter(name for v in self.raw for name in self.cap.broken(v)) if self.cap else Counter()
        return {name: found[name] for name in self.cap.on} if self.cap else {}

    def served(self) -> dict[str, int]:
        """Answers by the model, and its fingerprint, that the server says gave them."""
        return dict(Counter(f"{said.model} {said.fingerprint}".strip() for v in self.raw for said in v.said))

    def usage(self) -> dict[str, int]:
        """Tokens of all answers, as far as the server counted them, whether they were asked for now or before."""
        total: Counter[str] = Counter()
        for verdict in self.raw:
            for said in verdict.said:
                total.update({name: count for name, count in said.usage.items() if isinstance(count, int)})
        return dict(total)

    def records(self) -> list[Record]:
        """All scores, item by item in the order of the questions."""
        grouped: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
        for verdict in self.verdicts:
            for name in verdict.names:
                grouped[verdict.item, name].append(verdict)
        return [_record(item, name, verdicts) for (item, name), verdicts in grouped.items()]

    def values(self) -> dict[str, dict[str, float]]:
        """Scores that are there, ``{item: {score: value}}``."""
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for record in self.records():
            if record.value is not None:
                found[record.item][record.score] = record.value
        return dict(found)

    def rows(self, score: str) -> list[Row]:
        """Rows of one score for a run's ``scores/<score>.jsonl``."""
        return [_row(record) for record in self.records() if record.score == score]

    def bounds(self, score: str) -> Bounds:
        """Mean of a score over the items that have it, between the worst and the best that the others could make it."""
        own = [record for record in self.records() if record.score == score]
        found = [record.value for record in own if record.value is not None]
        mean = _mean(found) if found else None
        return Bounds(mean, _mean([r.low for r in own]), _mean([r.high for r in own]), len(found), len(own))

    def repeats(self, score: str) -> list[float]:
        """Mean of a score in each repeat, over the items that have it in all of them.

        How far these lie apart is the noise of the judge; `statistics.stdev` says it in one figure.
        """
        whole = [record.repeats for record in self.records() if record.score == score and record.value is not None]
        return [_mean([value for value in column if value is not None]) for column in zip(*whole, strict=True)]

    def joined(self, names: tuple[str, ...], compute: Callable[[Mapping[str, float]], Mapping[str, float]]) -> "Judged":
        """Scores in [0, 1] that follow from all questions about an item, for each repeat.

        Args:
            names: These scores.
            compute: Gives them from the scores of the questions, whose names differ.
        """
        grouped: dict[tuple[str, int], list[Verdict]] = defaultdict(list)
        for verdict in self.verdicts:
            grouped[verdict.item, verdict.repeat].append(verdict)
        found = []
        for (item, repeat), own in grouped.items():
            worst = next((v for status in ("failed", "unparsed") for v in own if v.status == status), own[0])
            scores = compute({n: x for v in own for n, x in v.scores.items()}) if worst.status == "scored" else {}
            said = tuple(completion for v in own for completion in v.said)
            found.append(Verdict(item, item, repeat, names, 0.0, 1.0, worst.status, scores, worst.why, said))
        return Judged(found, self.settings)

    def coverage(self) -> tuple[int, int]:
        """Scores that are there, and those that were asked for."""
        records = self.records()
        return sum(record.value is not None for record in records), len(records)

    def require(self, threshold: float = 1.0) -> None:
        """See that enough was scored.

        Args:
            threshold: Least share of scores that are there, in [0, 1].

        Raises:
            DataError: There are fewer.
        """
        n, of = self.coverage()
        if n >= threshold * of:
            return
        missing = [record for record in self.records() if record.value is None]
        told = "; ".join(f"{r.item} {r.score}: {r.status}, {r.why}" for r in missing[:3])
        more = f"; and {len(missing) - 3} more" * (len(missing) > 3)
        raise DataError(
            f"the judge scored {n} of {of}, at least {threshold:.6g} of them are needed",
            why=told + more,
            fix="run again, which asks for what failed; or take a lower threshold, and report coverage and bounds",
        )


def _record(item: str, name: str, verdicts: Sequence[Verdict]) -> Record:
    by_repeat: dict[int, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_repeat[verdict.repeat].append(verdict)
    missing = [v for v in verdicts if name not in v.scores]
    status: Status = "scored"
    if missing:
        status = "failed" if any(v.status == "failed" for v in missing) else "unparsed"
    low, high = (
        _mean([v.scores.get(name, end) for v, end in zip(verdicts, ends, strict=True)])
        for ends in ([v.low for v in verdicts], [v.high for v in verdicts])
    )
    repeats = tuple(
        None if any(name not in v.scores for v in own) else _mean([v.scores[name] for v in own])
        for _, own in sorted(by_repeat.items())
    )
    why = next((v.why for v in missing if v.status == status), "")
    return Record(item, name, status, None if missing else low, low, high, repeats, why)


def _row(record: Record) -> Row:
    row: Row = {"id": record.item, "status": record.status}
    if record.value is None:
        return {**row, "failed": f"{record.status}: {record.why}", "low": record.low, "high": record.high}
    return {**row, "value": record.value, **({"repeats": list(record.repeats)} if len(record.repeats) > 1 else {})}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan

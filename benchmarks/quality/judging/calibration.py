"""Calibration of a judge: fixed questions with the answers that it once gave, to see whether it still gives them.

A name, even a dated one, does not promise that the same model answers. Asking a fixed set again does show it.
"""

import json
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.quality.folder import digest
from benchmarks.quality.judging.answers import Answers
from benchmarks.quality.judging.asking import ask
from benchmarks.quality.judging.question import Judge, Question
from bernini.errors import ConfigError
from bernini.files import write_text


class Change(NamedTuple):
    """A score that is not what it was; None where there is none."""

    question: str
    score: str
    then: float | None
    now: float | None


@dataclass(frozen=True)
class Drift:
    """What a judge says now beside what was said then.

    Attributes:
        asked: Scores that were compared.
        changes: Those that differ.
        then: The judge that gave the stored answers: its identity, and the models that the server named.
        now: The same of the one that was asked now.
        means: Mean of each score over the questions that have it then and now: what it was, and what it is.
    """

    asked: int
    changes: tuple[Change, ...]
    then: dict[str, Any]
    now: dict[str, Any]
    means: dict[str, tuple[float, float]]

    @property
    def is_none(self) -> bool:
        """Whether everything is as it was."""
        return not self.changes and self.then == self.now

    def __str__(self) -> str:
        lines = [f"{len(self.changes)} of {self.asked} scores of the calibration set changed"]
        lines += [
            f"  {key}: was {self.then.get(key)}, is {self.now.get(key)}"
            for key in sorted(self.then.keys() | self.now.keys())
            if self.then.get(key) != self.now.get(key)
        ]
        lines += [
            f"  mean {name}: was {was:.4g}, is {now:.4g}" for name, (was, now) in self.means.items() if was != now
        ]
        lines += [f"  {c.question} {c.score}: was {_told(c.then)}, is {_told(c.now)}" for c in self.changes]
        return "\n".join(lines)


def calibrate(judge: Judge, questions: Sequence[Question], path: str | Path) -> Drift | None:
    """Ask a calibration set, without looking at answers that are kept elsewhere.

    The first time the answers are stored; from then on they are compared with, and a warning names what changed.

    Args:
        judge: Who is asked.
        questions: The set; what it shows must stay as it is.
        path: JSON file with the answers.

    Returns:
        What changed; null the first time.

    Raises:
        ConfigError: The set is not the one that the file has answers to.
        DataError: A question could not be scored the first time.
        UnwelcomeError: The judge answers nobody.
    """
    path = Path(path)
    asked = {q.key: digest([q.version, q.prompt().described()]) for q in questions}
    stored = json.loads(path.read_text()) if path.is_file() else None
    if stored and {key: row["asked"] for key, row in stored["answers"].items()} != asked:
        raise ConfigError(
            "the calibration set is not the one that was stored",
            where=str(path),
            why="a question, its wording or the bytes of what it shows differ",
            fix="give the set as it was, or another file to begin a new one",
        )
    with tempfile.TemporaryDirectory() as folder:
        judged = ask(judge, questions, Answers(Path(folder) / "answers.jsonl"))
    who = {**judged.settings["judge"], "served": sorted(judged.served())}
    rows = {v.question: {"asked": asked[v.question], "scores": dict(v.scores), "texts": v.texts} for v in judged.raw}
    if stored is None:
        judged.require()
        write_text(path, json.dumps({"judge": who, "answers": rows}, indent=2) + "\n")
        return None
    compared = [
        Change(v.question, name, stored["answers"][v.question]["scores"].get(name), v.scores.get(name))
        for v in judged.raw
        for name in v.names
    ]
    changes = tuple(c for c in compared if c.then != c.now)
    drift = Drift(len(compared), changes, stored["judge"], json.loads(json.dumps(who)), _means(compared))
    if not drift.is_none:
        warnings.warn(f"the judge is not what it was: {drift}", stacklevel=2)
    return drift


def _means(compared: Sequence[Change]) -> dict[str, tuple[float, float]]:
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for change in compared:
        if change.then is not None and change.now is not None:
            pairs[change.score].append((change.then, change.now))
    return {name: (fmean(a for a, _ in own), fmean(b for _, b in own)) for name, own in pairs.items()}


def _told(value: float | None) -> str:
    return "missing" if value is None else f"{value:g}"

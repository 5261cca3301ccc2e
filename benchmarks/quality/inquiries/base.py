"""What a judge is asked about the outputs of a benchmark, by a rubric of our own words or by the user's."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from benchmarks.quality.interface import Item
from benchmarks.quality.judging.forms import Form
from benchmarks.quality.judging.judged import Cap, Judged
from benchmarks.quality.judging.question import Question
from benchmarks.quality.judging.showing import Shown
from benchmarks.quality.official.base import OfficialBenchmark
from bernini.errors import ConfigError, DataError

INSTRUCTION = "<instruction>"
"""What stands in a rubric for what an item asks for; other facts of an item stand in angle brackets, too."""
FACT = re.compile("<([a-z_]+)>")


@dataclass(frozen=True)
class Rubric:
    """Texts that tell a judge how to score.

    Attributes:
        version: Tells it from any other: ``own-1``, or the hash of a file.
        texts: The texts by their keys, as the benchmark's `Inquiry` names them.
    """

    version: str
    texts: Mapping[str, str]

    @property
    def is_own(self) -> bool:
        """Whether it comes with the package."""
        return self.version.startswith("own-")

    def text(self, key: str, **facts: str) -> str:
        """One of the texts, with facts of an item in their places, such as ``instruction``."""
        return FACT.sub(lambda named: facts.get(named[1], named[0]), self.texts[key])

    def named(self, key: str) -> set[str]:
        """Facts that stand in one of the texts."""
        return {found[0] for found in FACT.finditer(self.texts[key])}


Kind = TypeVar("Kind", bound=OfficialBenchmark)


class Inquiry(ABC, Generic[Kind]):
    """The questions of one benchmark.

    Args:
        benchmark: Whose outputs are judged.
        rubric: File with other texts, see `read_rubric`; none for our own.

    Attributes:
        scores: Names of the scores that the questions give.
        own: The rubric that comes with the package.
        shown: Changes whenever what is shown does, or how.
        cap: The rule that the official rubric asks for, if there is one.
        repeats: How often the official protocol asks each question.
    """

    scores: ClassVar[tuple[str, ...]]
    own: ClassVar[Rubric]
    shown: ClassVar[str]
    cap: Cap | None = None
    repeats: ClassVar[int] = 1

    def __init__(self, benchmark: Kind, rubric: Path | None = None) -> None:
        self.benchmark = benchmark
        self.rubric = self.own if rubric is None else read_rubric(rubric, self.own, self.text_keys())

    def text_keys(self) -> Sequence[str]:
        """Texts that the benchmark's settings make use of: here all."""
        return tuple(self.own.texts)

    @property
    def version(self) -> str:
        """Of all its questions: the benchmark's, of what is shown, and of the rubric."""
        return f"{self.benchmark.name} {self.benchmark.version}, shown {self.shown}, rubric {self.rubric.version}"

    @abstractmethod
    def questions(self, item: Item, output: Path) -> list[Question]:
        """What is asked about an output.

        Args:
            item: The item.
            output: File of its output, which is read when the question is asked.

        Raises:
            DataError: The item's source is damaged.
        """

    def settle(self, judged: Judged) -> Judged:
        """The benchmark's scores from those of its questions: here the same."""
        return judged

    def question(
        self, item: Item, content: Sequence[str | Shown], form: Form, *, part: str = "", system: str = ""
    ) -> Question:
        """A question about an item.

        Args:
            item: The item.
            content: What is said and shown, in order.
            form: What the answer looks like.
            part: Tells it from other questions about the item.
            system: What is said before all else.
        """
        key = f"{item.id}/{part}" if part else item.id
        return Question(key, item.id, tuple(content), form, self.version, system)


def instruction(item: Item) -> str:
    """What an item asks for in its official words."""
    return str(item.extra.get("prompt", item.prompt))


def read_rubric(path: Path, own: Rubric, keys: Sequence[str]) -> Rubric:
    """Read a rubric, such as the official one out of a user's download.

    Args:
        path: JSON, an object with a text for each key; ``<instruction>`` stands for the item's instruction, and what
            else our own text of a key names stands likewise.
        own: Our own.
        keys: The keys that there have to be.

    Raises:
        ConfigError: There is no such file.
        DataError: It is no such object, or a text lacks what our own names.
    """
    if not path.is_file():
        raise ConfigError(f"there is no rubric {path}", where="--rubric", fix="leave it out for the package's own")
    data = path.read_bytes()
    try:
        texts = json.loads(data)
    except ValueError as error:
        raise DataError("the rubric is no JSON", where=str(path), why=str(error)) from error
    if not isinstance(texts, dict) or set(texts) != set(keys) or not all(isinstance(t, str) for t in texts.values()):
        raise DataError(
            "the rubric is not an object of texts",
            where=str(path),
            why=f"a text is needed for each of {', '.join(keys)}",
        )
    rubric = Rubric(f"file {hashlib.sha256(data).hexdigest()[:12]}", texts)
    for key in keys:
        if silent := sorted(own.named(key) - rubric.named(key)):
            raise DataError(
                f"the text {key!r} names no {silent[0]}",
                where=str(path),
                why="the judge would not know what is judged",
                fix=f"write {silent[0]} where it belongs",
            )
    return rubric

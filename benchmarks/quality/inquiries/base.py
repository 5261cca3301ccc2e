"""What a judge is asked about the outputs of a benchmark, by a rubric of our own words or by the user's."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from benchmarks.quality.interface import Item
from benchmarks.quality.judging.judged import Cap
from benchmarks.quality.judging.question import Question
from benchmarks.quality.official.base import OfficialBenchmark
from bernini.errors import ConfigError, DataError

INSTRUCTION = "<instruction>"
"""What stands in a rubric for what an item asks for."""


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

    def text(self, key: str, instruction: str) -> str:
        """One of the texts, with an instruction in its place."""
        return self.texts[key].replace(INSTRUCTION, instruction)


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
        instructed: Keys of texts that are nothing without the instruction.
        cap: The rule that the official rubric asks for, if there is one.
    """

    scores: ClassVar[tuple[str, ...]]
    own: ClassVar[Rubric]
    shown: ClassVar[str]
    instructed: ClassVar[tuple[str, ...]]
    cap: ClassVar[Cap | None] = None

    def __init__(self, benchmark: Kind, rubric: Path | None = None) -> None:
        self.benchmark = benchmark
        self.rubric = self.own if rubric is None else read_rubric(rubric, tuple(self.own.texts), self.instructed)

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


def read_rubric(path: Path, keys: tuple[str, ...], instructed: tuple[str, ...]) -> Rubric:
    """Read a rubric, such as the official one out of a user's download.

    Args:
        path: JSON, an object with a text for each key; ``<instruction>`` stands for the item's instruction.
        keys: The keys that there have to be.
        instructed: Those whose texts have to name the instruction.

    Raises:
        ConfigError: There is no such file.
        DataError: It is no such object.
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
    if silent := [key for key in instructed if INSTRUCTION not in texts[key]]:
        raise DataError(
            f"the text {silent[0]!r} names no instruction",
            where=str(path),
            why="the judge would not know what was asked for",
            fix=f"write {INSTRUCTION} where it belongs",
        )
    return Rubric(f"file {hashlib.sha256(data).hexdigest()[:12]}", texts)

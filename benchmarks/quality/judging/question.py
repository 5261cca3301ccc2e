"""What a judge is asked, whichever judge it is: the question of a benchmark, and the prompt that it becomes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from benchmarks.quality.folder import digest
from benchmarks.quality.judging.forms import Form
from benchmarks.quality.judging.showing import Seen, Shown
from bernini.chat import Completion


@dataclass(frozen=True, eq=False)
class Question:
    """A question about an output.

    Attributes:
        key: Unique among the questions of a run, e.g. ``0012/frame-27``.
        item: Id of the item that it is about. Scores of the same name that several questions give an item are averaged.
        content: Text, images and clips, in the order in which they are shown.
        form: What the answer looks like, and the scores that it holds.
        version: Changes whenever the wording, the rubric or what is shown does.
        system: What is said before all else, where a benchmark puts its rubric there; may be empty.
    """

    key: str
    item: str
    content: tuple[str | Shown, ...]
    form: Form
    version: str
    system: str = ""

    def prompt(self) -> "Prompt":
        """Read and encode what is shown.

        Raises:
            DataError: A file is missing or damaged, or lacks a frame.
        """
        content = tuple(part if isinstance(part, str) else part.see() for part in self.content)
        return Prompt(self.system, (Turn("user", content),))


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: Who says it.
        content: Text and pictures in order.
    """

    role: Literal["user", "assistant"]
    content: tuple[str | Seen, ...]


@dataclass(frozen=True)
class Prompt:
    """All that a judge is shown.

    Attributes:
        system: What is said before all else; may be empty.
        turns: The conversation up to where the judge is to speak.
    """

    system: str
    turns: tuple[Turn, ...]

    def after(self, answer: str, reminder: str) -> "Prompt":
        """The conversation with an answer and what is said to it."""
        return Prompt(self.system, (*self.turns, Turn("assistant", (answer,)), Turn("user", (reminder,))))

    def described(self) -> dict[str, Any]:
        """What tells it from any other prompt, plain JSON: its texts, and hashes of the bytes of what is shown."""
        turns = [
            {"role": t.role, "content": [p if isinstance(p, str) else p.described() for p in t.content]}
            for t in self.turns
        ]
        return {"system": self.system, "turns": turns}


class Judge(Protocol):
    """Somebody who answers.

    Attributes:
        name: Short, for the head of a column.
        workers: Questions that it takes at the same time.
    """

    @property
    def name(self) -> str:
        """See above."""

    @property
    def workers(self) -> int:
        """See above."""

    def identity(self) -> Mapping[str, Any]:
        """Everything about it that decides its answers, plain JSON: the model, and how it is asked."""

    def answer(self, prompt: Prompt, repeat: int, where: str) -> Completion:
        """Answer.

        Args:
            prompt: What is asked.
            repeat: Which of several askings of the same prompt this is, from 0.
            where: The question's key, for errors.

        Raises:
            UnwelcomeError: It would answer no other question either.
            ServiceError: It does not answer this one.
        """


def address(judge: Judge, prompt: Prompt, version: str, repeat: int) -> str:
    """SHA-256 of all that decides an answer: two askings that share it need one answer between them."""
    asked = {"judge": dict(judge.identity()), "prompt": prompt.described(), "version": version, "repeat": repeat}
    return digest(asked)

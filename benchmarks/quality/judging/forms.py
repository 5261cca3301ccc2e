"""Forms of answers: what a judge is to say, and strict readers that take nothing else.

A reader is a pure function of the text. It never guesses: a number that stands in prose, one number too many, one that
is out of range, a fraction or half a JSON is `Unreadable`, with the reason.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import whitespace
from typing import Any, Protocol

from bernini.errors import ConfigError

_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_MARK = "*_`\"'"  # emphasis and quotes, which change no meaning
_MARKS = f"[{_MARK}]*"
_NUMBER = r"[-+]?[0-9]{1,6}"


class Unreadable(Exception):
    """An answer that is not of the form that was asked for."""


class Form(Protocol):
    """What an answer looks like.

    Attributes:
        names: Scores that it holds.
        low: Least value of each.
        high: Largest value of each.
        reminder: What is said to a judge that answered in another form.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """See above."""

    @property
    def low(self) -> float:
        """See above."""

    @property
    def high(self) -> float:
        """See above."""

    @property
    def reminder(self) -> str:
        """See above."""

    def read(self, text: str) -> dict[str, float]:
        """Scores by name.

        Raises:
            Unreadable: The text is of another form.
        """


@dataclass(frozen=True)
class Integers:
    """Whole numbers and nothing else: ``4``, or for several ``3, 4, 5`` or ``[3, 4, 5]``.

    Attributes:
        names: A score for each, in their order.
        low: Least.
        high: Largest.
    """

    names: tuple[str, ...]
    low: int
    high: int

    def __post_init__(self) -> None:
        _check(self.names, self.low, self.high)

    @property
    def reminder(self) -> str:
        """What is said to a judge that answered in another form."""
        many = len(self.names)
        what = "one whole number" if many == 1 else f"exactly {many} whole numbers, separated by commas,"
        return f"Please answer with {what} from {self.low} to {self.high} and nothing else."

    def read(self, text: str) -> dict[str, float]:
        """See `Form`."""
        many = len(self.names)
        body = _bare(_said(text))
        if many > 1 and body.startswith("[") and body.endswith("]"):
            body = body[1:-1].strip()
        if not re.fullmatch(rf"{_NUMBER}(?:(?:\s*,\s*|\s+){_NUMBER}){{{many - 1}}}", body):
            raise Unreadable(f"not {'a bare whole number' if many == 1 else f'{many} bare whole numbers'}")
        return _ranged(self.names, [int(number) for number in re.findall(_NUMBER, body)], self.low, self.high)


@dataclass(frozen=True)
class Labelled:
    """Lines such as ``Instruction following: 4``, each label once; other lines may say anything.

    Attributes:
        labels: Label by the name of the score; case does not matter.
        low: Least.
        high: Largest.
    """

    labels: Mapping[str, str]
    low: int
    high: int

    def __post_init__(self) -> None:
        _check(self.names, self.low, self.high)

    @property
    def names(self) -> tuple[str, ...]:
        """Scores that it holds."""
        return tuple(self.labels)

    @property
    def reminder(self) -> str:
        """What is said to a judge that answered in another form."""
        lines = "\n".join(f"{label}: <whole number from {self.low} to {self.high}>" for label in self.labels.values())
        return f"Please answer with exactly these lines and nothing else:\n{lines}"

    def read(self, text: str) -> dict[str, float]:
        """See `Form`."""
        numbers = []
        for label in self.labels.values():
            start = rf"^[ \t]*(?:[-*][ \t]+)?{_MARKS}{re.escape(label)}{_MARKS}[ \t]*:"
            lines = re.findall(rf"{start}(.*)$", _said(text), re.MULTILINE | re.IGNORECASE)
            if len(lines) != 1:
                raise Unreadable(f"{len(lines) or 'no'} lines say {label!r}")
            if not re.fullmatch(_NUMBER, number := _bare(lines[0])):
                raise Unreadable(f"no bare whole number behind {label!r}")
            numbers.append(int(number))
        return _ranged(self.names, numbers, self.low, self.high)


@dataclass(frozen=True)
class Lines:
    """As many lines ``anything: 4`` as there are scores, in their order; other lines may say anything else.

    Attributes:
        names: A score for each.
        low: Least.
        high: Largest.
    """

    names: tuple[str, ...]
    low: int
    high: int

    def __post_init__(self) -> None:
        _check(self.names, self.low, self.high)

    @property
    def reminder(self) -> str:
        """What is said to a judge that answered in another form."""
        number = f"a whole number from {self.low} to {self.high}"
        return f"Please answer with exactly {len(self.names)} lines, each a label, a colon and {number}."

    def read(self, text: str) -> dict[str, float]:
        """See `Form`."""
        ends = (line.rpartition(":") for line in _said(text).splitlines())
        numbers = [_bare(end) for label, _, end in ends if label.strip() and re.fullmatch(_NUMBER, _bare(end))]
        if len(numbers) != len(self.names):
            raise Unreadable(f"{len(numbers) or 'no'} lines end with a colon and a whole number")
        return _ranged(self.names, [int(number) for number in numbers], self.low, self.high)


@dataclass(frozen=True)
class JsonIntegers:
    """A JSON object, maybe in a fence of Markdown; keys that are not asked for may hold anything.

    Attributes:
        keys: Names of the scores by key: one name for a whole number, several for a list of as many.
        low: Least.
        high: Largest.
    """

    keys: Mapping[str, Sequence[str]]
    low: int
    high: int

    def __post_init__(self) -> None:
        _check(self.names, self.low, self.high)

    @property
    def names(self) -> tuple[str, ...]:
        """Scores that it holds."""
        return tuple(name for names in self.keys.values() for name in names)

    @property
    def reminder(self) -> str:
        """What is said to a judge that answered in another form."""
        number = f"whole number from {self.low} to {self.high}"
        held = (
            f'"{key}": ' + (f"<{number}>" if len(names) == 1 else "[" + ", ".join(f"<{number}>" for _ in names) + "]")
            for key, names in self.keys.items()
        )
        return f"Please answer with one JSON object and nothing else, of the form {{{', '.join(held)}}}."

    def read(self, text: str) -> dict[str, float]:
        """See `Form`."""
        body = _said(text)
        first, _, rest = body.partition("\n")
        if first.strip().lower() in ("```", "```json") and rest.endswith("```"):
            body = rest.removesuffix("```")
        try:
            told = json.loads(body, object_pairs_hook=_without_twins)
        except (ValueError, RecursionError) as error:
            raise Unreadable("not one whole JSON object") from error
        if not isinstance(told, dict):
            raise Unreadable("not a JSON object")
        numbers: list[int] = []
        for key, names in self.keys.items():
            value: Any = told.get(key)
            found: list[Any] = value if len(names) > 1 and isinstance(value, list) else [value]
            if len(found) != len(names) or any(type(x) is not int for x in found):
                what = "a whole number" if len(names) == 1 else f"a list of {len(names)} whole numbers"
                raise Unreadable(f"{key!r} is not {what}")
            numbers += found
        return _ranged(self.names, numbers, self.low, self.high)


@dataclass(frozen=True)
class YesNo:
    """An answer that begins with yes or no, alone or before a mark of punctuation.

    Attributes:
        name: The score.
        right: The answer that is worth 1; the other one is worth 0.
    """

    name: str
    right: str = "yes"
    low: float = 0.0
    high: float = 1.0
    reminder: str = 'Please answer with the word "yes" or the word "no" and nothing else.'

    def __post_init__(self) -> None:
        _check(self.names, self.low, self.high)
        if self.right not in ("yes", "no"):
            raise ConfigError(f"{self.right!r} is to be the right answer", why="it is yes or no")

    @property
    def names(self) -> tuple[str, ...]:
        """Scores that it holds."""
        return (self.name,)

    def read(self, text: str) -> dict[str, float]:
        """See `Form`."""
        said = re.match(rf"{_MARKS}(yes|no){_MARKS}(?:[.,;:!]|\n|$)", _said(text), re.IGNORECASE)
        if said is None:
            raise Unreadable("it does not begin with yes or no")
        return {self.name: float(said[1].lower() == self.right)}


@dataclass(frozen=True)
class Letter:
    """One of the letters of a choice, alone or set off: ``b``, ``(B)``, ``B. a red car``.

    Attributes:
        name: The score.
        letters: All of the choice, in lower case.
        right: The one that is worth 1; others are worth 0.
    """

    name: str
    letters: str
    right: str
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check(self.names, self.low, self.high)
        if not (self.letters.islower() and self.letters.isalpha() and self.right in tuple(self.letters)):
            raise ConfigError(f"{self.right!r} is not one of the letters {self.letters!r}", fix="use lower case")

    @property
    def names(self) -> tuple[str, ...]:
        """Scores that it holds."""
        return (self.name,)

    @property
    def reminder(self) -> str:
        """What is said to a judge that answered in another form."""
        return f"Please answer with one of the letters {', '.join(self.letters)} and nothing else."

    def read(self, text: str) -> dict[str, float]:
        """See `Form`."""
        # A letter before a blank may be a word: "A car is seen".
        said = re.match(rf"{_MARKS}(?:\(([a-z])\)|([a-z]){_MARKS}(?:[.,:)]|\n|$))", _said(text), re.IGNORECASE)
        letter = (said[1] or said[2]).lower() if said else ""
        if not letter or letter not in self.letters:
            raise Unreadable(f"it does not begin with one of the letters {', '.join(self.letters)}")
        return {self.name: float(letter == self.right)}


@dataclass(frozen=True)
class Sum:
    """The sum of all scores of another form, as one score.

    Attributes:
        name: The score.
        parts: What the answer looks like.
    """

    name: str
    parts: Form

    @property
    def names(self) -> tuple[str, ...]:
        """Scores that it holds."""
        return (self.name,)

    @property
    def low(self) -> float:
        """Least value."""
        return self.parts.low * len(self.parts.names)

    @property
    def high(self) -> float:
        """Largest value."""
        return self.parts.high * len(self.parts.names)

    @property
    def reminder(self) -> str:
        """What is said to a judge that answered in another form."""
        return self.parts.reminder

    def read(self, text: str) -> dict[str, float]:
        """See `Form`."""
        return {self.name: sum(self.parts.read(text).values())}


def _said(text: str) -> str:
    """An answer without the thoughts that some servers leave before it."""
    return _THOUGHT.sub("", text, count=1).strip() if _THOUGHT.match(text) else text.strip()


def _bare(text: str) -> str:
    """A text without emphasis, quotes and a full stop around it."""
    around = _MARK + whitespace
    return text.strip(around).removesuffix(".").strip(around)


def _ranged(names: Sequence[str], numbers: Sequence[int], low: int, high: int) -> dict[str, float]:
    for number in numbers:
        if not low <= number <= high:
            raise Unreadable(f"{number} is not from {low} to {high}")
    return {name: float(number) for name, number in zip(names, numbers, strict=True)}


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _check(names: Sequence[str], low: float, high: float) -> None:
    if not names or len(set(names)) < len(names) or "" in names or low >= high:
        raise ConfigError(
            f"an answer with the scores {', '.join(names) or 'missing'} from {low} to {high}",
            why="there is a score at least, each has a name of its own, and low is below high",
        )

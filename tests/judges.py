"""What tests of judges share: questions, a server that scores them by number, and a run to be killed."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import torch
from servers import Server, say

from benchmarks.quality.folder import digest
from benchmarks.quality.judging.answers import Answers
from benchmarks.quality.judging.asking import ask
from benchmarks.quality.judging.endpoint import EndpointConfig, EndpointJudge
from benchmarks.quality.judging.forms import Form, Integers
from benchmarks.quality.judging.judged import Judged
from benchmarks.quality.judging.question import Question
from benchmarks.quality.judging.showing import Shown

MODEL = "judge-2026-01-31"
FORM = Integers(("quality",), 1, 5)


def make_question(number: int, form: Form = FORM, **more: Any) -> Question:
    """Question ``number`` about an item of its own."""
    picture = torch.full((3, 1, 8, 8), number, dtype=torch.uint8)
    given = {"key": f"q{number}", "item": f"item{number}", "content": (Shown(picture), f"Rate number {number}.")}
    return Question(**{**given, "form": form, "version": "1", "system": "You rate.", **more})


def make_judge(url: str, **more: Any) -> EndpointJudge:
    return EndpointJudge(EndpointConfig(**{"url": url, "model": MODEL, "timeout": 20.0, "wait": 0.01, **more}))


def numbered(body: dict[str, Any]) -> int:
    """The number of the question that a request asks."""
    (user, *_) = (message for message in body["messages"] if message["role"] == "user")
    return int(re.search(r"number (\d+)", json.dumps(user))[1])


class Scorer:
    """Replies that follow from the question alone, and a count of what was asked."""

    def __init__(self, server: Server, delay: float = 0.0) -> None:
        self.asked: list[int] = []
        self.delay, self.lock = delay, threading.Lock()
        server.replies = [self]

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        number = numbered(handler.body)
        with self.lock:
            self.asked.append(number)
        time.sleep(self.delay * (1 + number % 3))
        say(str(1 + number % 5), finish_reason="stop")(handler)

    @property
    def times(self) -> Counter[int]:
        """How often each question was asked."""
        with self.lock:
            return Counter(self.asked)


def words(body: dict[str, Any]) -> str:
    """All text of a question, without the reminder that may have followed."""
    content = next(message["content"] for message in body["messages"] if message["role"] == "user")
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


class Replies:
    """Answers that follow from the text of a question alone, and a count of what was asked, to the byte."""

    def __init__(self, server: Server, answer: Callable[[str], str]) -> None:
        self.answer, self.times, self.lock = answer, Counter[str](), threading.Lock()
        server.replies = [self]

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        with self.lock:
            self.times[digest(handler.body)] += 1
        say(self.answer(words(handler.body)), finish_reason="stop")(handler)


def run(url: str, folder: str, count: int, repeats: int = 1, workers: int = 4) -> Judged:
    """Ask the first ``count`` questions; in a process of its own it can be killed."""
    judge = make_judge(url, workers=workers)
    return ask(judge, [make_question(n) for n in range(count)], Answers(Path(folder) / "a.jsonl"), repeats=repeats)

"""A judge behind an OpenAI-compatible chat endpoint. Frames of clips are sent as pictures, one after the other."""

import base64
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from benchmarks.quality.judging.question import Prompt, Turn
from bernini.chat import Chat, ChatConfig, Completion
from bernini.errors import ConfigError

# 2024-11-20 or 20241120; -05-06 or -0613; -2411 (year and month).
_MONTH, _DAY = "(?:0[1-9]|1[0-2])", "(?:0[1-9]|[12][0-9]|3[01])"
DATED = re.compile(rf"20[0-9]{{2}}-?{_MONTH}-?{_DAY}(?![0-9])|-{_MONTH}-?{_DAY}(?![0-9])|-2[0-9]{_MONTH}(?![0-9])")


@dataclass(frozen=True)
class EndpointConfig(ChatConfig):
    """Where a judge is, which model it is, to the version, and how it answers.

    Attributes:
        revision: What pins a model whose name has no date: the commit of its weights, or the provider's version.
        temperature: 0 for the likeliest answer; null leaves it to the server, and is what models take that refuse it.
        seed: Seed of the first repeat, each further one has the next; null sends none.
        max_tokens: Most tokens of an answer, those of its thoughts included.
        effort: ``reasoning_effort`` of a model that thinks first; null for others. With it the limit is sent as
            ``max_completion_tokens``, and no temperature is.
    """

    who: ClassVar[str] = "the judge"
    jitter: ClassVar[float] = 0.25

    retries: int = 5
    wait: float = 2.0
    revision: str = ""
    temperature: float | None = 0.0
    seed: int | None = 0
    max_tokens: int = 1024
    effort: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.revision and not DATED.search(self.model):
            raise ConfigError(
                f"the judge {self.model!r} is not pinned",
                where="the judge's model",
                why="the name has no date, so that what answers to it may change",
                fix="name a snapshot such as gpt-4o-2024-11-20, or give the revision of its weights or its version",
            )
        if self.max_tokens < 1 or not 0 <= (self.temperature or 0.0) <= 2:
            raise ConfigError("a judge's max_tokens is at least 1, and its temperature in [0, 2]")


class EndpointJudge:
    """Asks a model elsewhere.

    Args:
        config: Which one, and where.

    Raises:
        ConfigError: The variable that should hold the key is not set.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.config, self._chat = config, Chat(config)

    @property
    def name(self) -> str:
        """Model, with its revision where the name has no date."""
        return "@".join(part for part in (self.config.model, self.config.revision) if part)

    @property
    def workers(self) -> int:
        """Requests on the way at the same time."""
        return self.config.workers

    def identity(self) -> dict[str, Any]:
        """The model and its options; not where it is, nor how long it is waited for."""
        config = self.config
        return {"kind": "endpoint", "model": config.model, "revision": config.revision, **self._options(0)}

    def answer(self, prompt: Prompt, repeat: int, where: str) -> Completion:
        """See `Judge`."""
        return self._chat.ask({"messages": messages(prompt), **self._options(repeat)}, lambda said: said, where)

    def _options(self, repeat: int) -> dict[str, Any]:
        config = self.config
        thinks = config.effort is not None
        options: Mapping[str, Any] = {
            "max_completion_tokens" if thinks else "max_tokens": config.max_tokens,
            "reasoning_effort": config.effort,
            "temperature": None if thinks else config.temperature,
            "seed": None if config.seed is None else config.seed + repeat,
        }
        return {name: value for name, value in options.items() if value is not None}


def messages(prompt: Prompt) -> list[dict[str, Any]]:
    """A prompt as messages of the chat interface."""
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, *({"role": turn.role, "content": _content(turn)} for turn in prompt.turns)]


def _content(turn: Turn) -> str | list[dict[str, Any]]:
    if all(isinstance(part, str) for part in turn.content):
        return "".join(str(part) for part in turn.content)
    return list(_parts(turn))


def _parts(turn: Turn) -> Iterator[dict[str, Any]]:
    for part in turn.content:
        if isinstance(part, str):
            yield {"type": "text", "text": part}
            continue
        for frame in part.frames:
            data = base64.b64encode(frame).decode()
            yield {"type": "image_url", "image_url": {"url": f"data:{part.kind};base64,{data}"}}

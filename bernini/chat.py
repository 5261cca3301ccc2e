"""A client of servers with OpenAI's chat endpoint: one question, and an answer that can be used or one error.

What may pass is asked again: statuses 408, 409, 425, 429 and 5xx, a broken connection, no whole answer in time, a reply
that is no chat completion, and whatever the caller calls `Useless`. Any other status is final. The key goes from an
environment variable into one header, to the url that was given and to nobody else.
"""

import json
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import requests

from bernini.errors import ConfigError, ServiceError

MOST_BYTES = 2**17  # of a reply
LONGEST_WAIT = 120.0  # seconds between two attempts, whatever a server asks for
PASSING = (408, 409, 425, 429)  # statuses besides 5xx after which it is worth asking again
FIXES = {
    **dict.fromkeys((401, 403), "check the key in the environment variable that was named for it"),
    404: "check {who}'s url, which ends before /chat/completions, and model",
}

T = TypeVar("T")


@dataclass(frozen=True)
class ChatConfig:
    """Where a model is, and how long it is waited for.

    Attributes:
        url: Root of the interface, e.g. ``http://localhost:8000/v1``.
        model: Name of the model there.
        key_variable: Environment variable that holds the key; null sends none.
        timeout: Seconds for one answer, from the request to the last byte.
        retries: How often an answer that cannot be used is asked for again.
        wait: Seconds before the first of these; each further wait is twice as long.
        workers: Requests on the way at the same time.
        who: What errors call the model.
        jitter: Waits are longer by up to this share of themselves, drawn anew each time.
    """

    who: ClassVar[str] = "the model"
    jitter: ClassVar[float] = 0.0

    url: str
    model: str
    key_variable: str | None = None
    timeout: float = 60.0
    retries: int = 3
    wait: float = 1.0
    workers: int = 4

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ConfigError(  # which does not show it: there may be a key in it
                f"{self.who}'s url cannot be used",
                where=f"{self.who}'s url",
                why="it is the root of the interface, without a user, a key or anything behind a question mark",
                fix="give it like http://localhost:8000/v1, and name the variable with the key apart",
            )
        if not self.model or self.timeout <= 0 or self.retries < 0 or self.wait < 0:
            why = "there is a model, the timeout is above 0, and retries and wait are at least 0"
            raise ConfigError(f"{self.who} cannot be asked like that", why=why)
        if self.workers < 1:
            raise ConfigError(f"the workers of {self.who} are at least 1")


@dataclass(frozen=True)
class Completion:
    """What a model answered.

    Attributes:
        text: The answer as it came; empty where there is none.
        finish: Why it ended: ``stop``, ``length`` or ``content_filter`` where it was cut; empty where nobody says.
        model: Name that the server gives the model.
        fingerprint: The server's name for the system that answered, if it gives one.
        usage: Tokens as the server counts them.
        seconds: From the request to the last byte.
    """

    text: str
    finish: str = ""
    model: str = ""
    fingerprint: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_cut(self) -> bool:
        """Whether the answer stops where the model was not through, or parts of it were taken out."""
        return self.finish in ("length", "content_filter")


class Useless(Exception):
    """An answer that another attempt may mend.

    Args:
        why: What is wrong with it.
        wait: Seconds that the server asks to be left alone.
    """

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class UnwelcomeError(ServiceError):
    """A refusal that any other question would meet, too: the key, the url or the model is wrong."""


class Chat:
    """Asks a model elsewhere.

    Args:
        config: Where it is.

    Raises:
        ConfigError: The variable that should hold the key is not set.
    """

    def __init__(self, config: ChatConfig) -> None:
        self.config, name = config, config.key_variable
        self._key = os.environ.get(name, "").strip() if name else ""
        if name and not (self._key and self._key.isascii() and self._key.isprintable()):
            raise ConfigError(
                f"there is no key in the environment variable {name}",
                where=f"{config.who}'s key",
                why="its characters are no key's" if self._key else "it is empty or not set",
                fix=f"export {name}=..., or name no variable for a server that wants no key",
            )

    def ask(self, body: Mapping[str, Any], accept: Callable[[Completion], T], where: str = "") -> T:
        """Ask until there is an answer that can be used.

        Args:
            body: Fields of the request besides the model, such as ``messages``.
            accept: Gives what is wanted of an answer, or raises `Useless`.
            where: What is asked about, for errors.

        Raises:
            UnwelcomeError: The server refused with a status that says so of every request: 401, 403 or 404.
            ServiceError: It refused this one, or no attempt gave an answer that can be used.
        """
        problem, asked_wait = "", 0.0
        for attempt in range(self.config.retries + 1):
            if attempt:
                own = self.config.wait * 2 ** (attempt - 1) * (1 + self.config.jitter * random.random())
                time.sleep(min(max(own, asked_wait), LONGEST_WAIT))
            try:
                return accept(self._completion(body, where))
            except Useless as error:
                problem, asked_wait = str(error), error.wait
        raise ServiceError(
            f"{self.config.who} gave no answer that can be used in {self.config.retries + 1} attempts",
            where=self._where(where),
            why=f"at last: {problem}",
            fix=f"try again later, raise {self.config.who}'s timeout or retries, or go without it",
        )

    def _completion(self, body: Mapping[str, Any], where: str) -> Completion:
        start = time.monotonic()
        reply = self._reply({"model": self.config.model, **body}, where)
        seconds = time.monotonic() - start
        try:
            told = json.loads(reply)
            choice = told["choices"][0]
            text = choice["message"]["content"]
            usage = told.get("usage")
            return Completion(
                text=text if isinstance(text, str) else "",
                finish=str(choice.get("finish_reason") or ""),
                model=str(told.get("model") or ""),
                fingerprint=str(told.get("system_fingerprint") or ""),
                usage=usage if isinstance(usage, dict) else {},
                seconds=round(seconds, 3),
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Useless("the reply is not a chat completion") from error

    def _reply(self, body: dict[str, Any], where: str) -> bytes:
        """The body of a reply of status 200."""
        until = time.monotonic() + self.config.timeout
        content = bytearray()
        try:
            with requests.post(
                f"{self.config.url.rstrip('/')}/chat/completions",
                json=body,
                timeout=self.config.timeout,
                stream=True,
                allow_redirects=False,  # the key goes to nobody else
                auth=self._authorize,
            ) as response:
                for byte in response.iter_content(1):  # else a server that sends one now and then outlasts the timeout
                    content += byte
                    if time.monotonic() > until:
                        raise Useless(f"no whole answer in {self.config.timeout:g} s")
                    if len(content) > MOST_BYTES:
                        raise Useless(f"an answer of more than {MOST_BYTES} bytes")
        except requests.Timeout as error:
            raise Useless(f"no answer in {self.config.timeout:g} s") from error
        except requests.RequestException as error:
            raise Useless(f"the connection failed ({type(error).__name__})") from error
        status = response.status_code
        if status in PASSING or status >= 500:
            raise Useless(f"status {status}: {self._said(content)}", _wait(response.headers.get("Retry-After", "")))
        if status != 200:
            raise (UnwelcomeError if status in FIXES else ServiceError)(
                f"{self.config.who} refused with status {status}",
                where=self._where(where),
                why=self._said(content),
                fix=FIXES.get(
                    status, "check {who}'s url, model and settings, and whether the model takes images"
                ).format(who=self.config.who),
            )
        return bytes(content)

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Sets the key, and keeps requests from looking for others in ~/.netrc."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _said(self, content: bytes | bytearray) -> str:
        """The beginning of what came with a status, without the key."""
        try:
            told = json.loads(content)["error"]
            text = str(told["message"] if isinstance(told, dict) else told)
        except (ValueError, LookupError, TypeError):
            text = content.decode(errors="replace")
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:200] or "no reason was given"

    def _where(self, where: str) -> str:
        return ", ".join(part for part in (where, self.config.url) if part)


def _wait(told: str) -> float:
    """Seconds that a ``Retry-After`` header asks for, which are given as such or as a date; 0 if it cannot be read."""
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except ValueError:
        return 0.0

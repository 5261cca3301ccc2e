"""A model elsewhere rewrites instructions: any server with an OpenAI-compatible chat endpoint.

It gets the instruction, and what the request shows: images, and three frames of each clip. Its answer becomes the
prompt. An answer that cannot be used is asked for again a few times; then there is one error, and nothing goes on with
an instruction that was not rewritten.
"""

import base64
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
import torch
from torch import Tensor

from bernini.conversation import Conversation, Message
from bernini.errors import ConfigError, DataError, ServiceError
from bernini.media import encode_image, fit_size, resize
from bernini.reasoning import instruction

FRAMES = 3  # of a clip, from the first to the last
EDGE = 512  # longest of an image that is sent, in pixels
MOST_BYTES = 2**17  # of a reply
PASSING = (408, 409, 425, 429)  # statuses besides 5xx after which it is worth asking again
FIXES = {
    **dict.fromkeys((401, 403), "check the key in the environment variable that was named for it"),
    404: "check the rewriter's url, which ends before /chat/completions, and model",
}

_MAKE = "You rewrite requests for {what} into prompts for a generator."
_CHANGE = (
    "You rewrite instructions for editing {what} into prompts for an editing model. First say exactly what changes, "
    "and which thing it is, by its looks, so that nobody has to guess or to reason; then describe the result in full. "
    "Whatever the instruction does not mention stays, and is not to be described as changed."
)
_REFERENCES = (
    " The images that come with it are references: say of each thing whose looks they give which image it is in, by "
    "the image's name, and describe it only as far as the image shows it."
)
_MOTION = " Say what moves, where to and how, and what the camera does."
_FORM = (
    " Answer with the prompt alone: one paragraph of plain English, at most 200 words, without quotes, headings or "
    "comments. Keep names, numbers, and text that is to be seen, word for word. Call images and videos by the names "
    "that they have here, such as image0; there are no others."
)

_SYSTEM = {
    "t2i": _MAKE.format(what="an image") + " Describe subjects, looks, places, background, light and style.",
    "t2v": _MAKE.format(what="a video") + " Describe subjects, looks, background, light and style." + _MOTION,
    "i2v": _MAKE.format(what="a video that begins with an image") + _MOTION + " Do not describe what the image shows.",
    "r2i": _MAKE.format(what="an image of given subjects") + _REFERENCES,
    "r2v": _MAKE.format(what="a video of given subjects") + _REFERENCES + _MOTION,
    "i2i": _CHANGE.format(what="an image"),
    "v2v": _CHANGE.format(what="a video"),
    "rv2v": _CHANGE.format(what="a video") + _REFERENCES,
}
_ALIKE = {"mv2v": "v2v", "vrc2v": "rv2v", "vi2v": "rv2v", "ads2v": "rv2v"}


@dataclass(frozen=True)
class RewriterConfig:
    """Where the rewriter is, and how long it is waited for.

    Attributes:
        url: Root of the interface, e.g. ``http://localhost:8000/v1``.
        model: Name of the model there.
        key_variable: Environment variable that holds the key; null sends none.
        timeout: Seconds for one answer, from the request to the last byte.
        retries: How often an answer that cannot be used is asked for again.
        wait: Seconds before the first of these; each further wait is twice as long.
        max_characters: Longest prompt.
        workers: Requests on the way at the same time.
    """

    url: str
    model: str
    key_variable: str | None = None
    timeout: float = 60.0
    retries: int = 3
    wait: float = 1.0
    max_characters: int = 2000
    workers: int = 4

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ConfigError(  # which does not show it: there may be a key in it
                "the rewriter's url cannot be used",
                where="the rewriter's url",
                why="it is the root of the interface, without a user, a key or anything behind a question mark",
                fix="give it like http://localhost:8000/v1, and name the variable with the key apart",
            )
        if not self.model or self.timeout <= 0 or self.retries < 0 or self.wait < 0:
            why = "there is a model, the timeout is above 0, and retries and wait are at least 0"
            raise ConfigError("the rewriter cannot be asked like that", why=why)
        if min(self.max_characters, self.workers) < 1:
            raise ConfigError("max_characters and workers of the rewriter are at least 1")


class _Useless(Exception):
    """An answer that another attempt may mend."""


class Rewriter:
    """Rewrites instructions with a model elsewhere.

    Args:
        config: Where it is.

    Raises:
        ConfigError: The variable that should hold the key is not set.
    """

    def __init__(self, config: RewriterConfig) -> None:
        self.config, name = config, config.key_variable
        self._key = os.environ.get(name, "").strip() if name else ""
        if name and not (self._key and self._key.isascii() and self._key.isprintable()):
            raise ConfigError(
                f"there is no key in the environment variable {name}",
                where="the rewriter's key",
                why="its characters are no key's" if self._key else "it is empty or not set",
                fix=f"export {name}=..., or name no variable for a server that wants no key",
            )

    def rewrite(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """Put rewritten prompts in the place of instructions.

        Args:
            conversations: Requests with a prompt; sources have pixels.

        Raises:
            ConfigError: A task is unknown.
            DataError: A request has no prompt, or a source no pixels.
            ServiceError: There was no answer that could be used.
        """
        with ThreadPoolExecutor(self.config.workers) as pool:
            prompts = list(pool.map(self._prompt, conversations))
        return [c.with_prompt(prompt) for c, prompt in zip(conversations, prompts, strict=True)]

    def _prompt(self, conversation: Conversation) -> str:
        body = {"model": self.config.model, "messages": messages(conversation)}
        problem = ""
        for attempt in range(self.config.retries + 1):
            if attempt:
                time.sleep(self.config.wait * 2 ** (attempt - 1))
            try:
                return self._checked(self._reply(body, conversation), conversation)
            except _Useless as error:
                problem = str(error)
        raise ServiceError(
            f"the rewriter gave no answer that can be used in {self.config.retries + 1} attempts",
            where=self._where(conversation),
            why=f"at last: {problem}",
            fix="try again later, raise the rewriter's timeout or retries, or go without it",
        )

    def _reply(self, body: dict[str, Any], conversation: Conversation) -> bytes:
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
                        raise _Useless(f"no whole answer in {self.config.timeout:g} s")
                    if len(content) > MOST_BYTES:
                        raise _Useless(f"an answer of more than {MOST_BYTES} bytes")
        except requests.Timeout as error:
            raise _Useless(f"no answer in {self.config.timeout:g} s") from error
        except requests.RequestException as error:
            raise _Useless(f"the connection failed ({type(error).__name__})") from error
        status = response.status_code
        if status in PASSING or status >= 500:
            raise _Useless(f"status {status}: {self._said(content)}")
        if status != 200:
            raise ServiceError(
                f"the rewriter refused with status {status}",
                where=self._where(conversation),
                why=self._said(content),
                fix=FIXES.get(status, "check the rewriter's url and model, and whether the model takes images"),
            )
        return bytes(content)

    def _checked(self, reply: bytes, conversation: Conversation) -> str:
        """The prompt in a reply, if it can be used."""
        try:
            choice = json.loads(reply)["choices"][0]
            text = choice["message"]["content"]
            cut = choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _Useless("the reply is not a chat completion") from error
        if not isinstance(text, str) or not (text := text.strip()):
            raise _Useless("the answer is empty")
        if cut:
            raise _Useless("the answer was cut short")
        if len(text) > self.config.max_characters:
            raise _Useless(f"the answer has {len(text)} characters, at most {self.config.max_characters} are taken")
        given = {name for name, _ in _named(conversation)}
        if unknown := {name.lower() for name in re.findall(r"\b(?:image|video)\d+\b", text, re.IGNORECASE)} - given:
            raise _Useless(f"the answer speaks of {min(unknown)}, the request has {', '.join(sorted(given)) or 'none'}")
        return text

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

    def _where(self, conversation: Conversation) -> str:
        return ", ".join(part for part in (conversation.key, self.config.url) if part)


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    """A request as messages of the chat interface: how to rewrite, what is shown, and the instruction.

    Raises:
        ConfigError: The task is unknown.
        DataError: The request has no prompt, or a source no pixels.
    """
    task = conversation.spec.name
    content: list[dict[str, Any]] = []
    for name, message in _named(conversation):
        media = message.media
        if media is None or media.pixels is None:
            raise DataError(f"{name} has no pixels to show", where=conversation.key, fix="keep raw media")
        frames = _frames(media.pixels)
        caption = f"{name}:" if message.is_image else f"{name}, {len(frames)} frames from first to last:"
        content.append({"type": "text", "text": caption})
        content += [{"type": "image_url", "image_url": {"url": _as_url(frame)}} for frame in frames]
    content.append({"type": "text", "text": f"The instruction: {instruction(conversation)}"})
    system = _SYSTEM[_ALIKE.get(task, task)] + _FORM
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def _named(conversation: Conversation) -> Iterator[tuple[str, Message]]:
    """Sources with the names that prompts call them by: ``image0``, ``image1`` and so on, and the same for videos."""
    numbers = {"image": 0, "video": 0}
    for message in conversation.sources:
        kind = "image" if message.is_image else "video"
        yield f"{kind}{numbers[kind]}", message
        numbers[kind] += 1


def _frames(pixels: Tensor) -> list[Tensor]:
    """Frames ``[3, 1, h, w]``, evenly spaced, of an image or a clip ``[3, T, H, W]``, as large as they are sent."""
    last = pixels.shape[1] - 1
    places = torch.linspace(0, last, min(FRAMES, last + 1)).round().long()
    height, width = fit_size(*pixels.shape[2:], max_edge=EDGE, multiple=1)
    return list(resize(pixels[:, places], height, width).split(1, dim=1))


def _as_url(frame: Tensor) -> str:
    return f"data:image/png;base64,{base64.b64encode(encode_image(frame)).decode()}"

"""A model elsewhere rewrites instructions: any server with an OpenAI-compatible chat endpoint.

It gets the instruction, and what the request shows: images, and three frames of each clip. Its answer becomes the
prompt. An answer that cannot be used is asked for again a few times; then there is one error, and nothing goes on with
an instruction that was not rewritten.
"""

import base64
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from bernini.chat import Chat, ChatConfig, Completion, Useless
from bernini.conversation import Conversation, Message
from bernini.errors import ConfigError, DataError
from bernini.media import encode_image, fit_size, resize
from bernini.reasoning import instruction

FRAMES = 3  # of a clip, from the first to the last
EDGE = 512  # longest of an image that is sent, in pixels

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
class RewriterConfig(ChatConfig):
    """Where the rewriter is, how long it is waited for, and how long a prompt may be.

    Attributes:
        max_characters: Longest prompt.
    """

    who: ClassVar[str] = "the rewriter"

    max_characters: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_characters < 1:
            raise ConfigError("max_characters of the rewriter is at least 1")


class Rewriter:
    """Rewrites instructions with a model elsewhere.

    Args:
        config: Where it is.

    Raises:
        ConfigError: The variable that should hold the key is not set.
    """

    def __init__(self, config: RewriterConfig) -> None:
        self.config, self._chat = config, Chat(config)

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
        body = {"messages": messages(conversation)}
        return self._chat.ask(body, partial(self._checked, conversation), conversation.key)

    def _checked(self, conversation: Conversation, completion: Completion) -> str:
        """The prompt in an answer, if it can be used."""
        if not (text := completion.text.strip()):
            raise Useless("the answer is empty")
        if completion.is_cut:
            raise Useless("the answer was cut short")
        if len(text) > self.config.max_characters:
            raise Useless(f"the answer has {len(text)} characters, at most {self.config.max_characters} are taken")
        given = {name for name, _ in _named(conversation)}
        if unknown := {name.lower() for name in re.findall(r"\b(?:image|video)\d+\b", text, re.IGNORECASE)} - given:
            raise Useless(f"the answer speaks of {min(unknown)}, the request has {', '.join(sorted(given)) or 'none'}")
        return text


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

"""Thinking before drawing, as changes of requests: an instruction becomes an explicit prompt, an edit a propagation.

The planner, or a model elsewhere (`bernini.rewriting`), rewrites the instruction (paper, section 3.6, self-text). What
it writes may reason first: the last paragraph is the prompt, all before it is thrown away, and planning and rendering
go on from the prompt as they would from one of the user's. Then a frame may be edited, and propagated into the clip
(self-vision-text).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from bernini.conversation import Conversation, Media, Message
from bernini.errors import ConfigError, DataError

Reasoning = Literal["none", "text", "vision"]
"""What comes before drawing: nothing; the planner's words; these, and then an edited frame."""

PROPAGATE = "make the whole video look like image0"
"""What vi2v is asked for: the source clip is edited as its first frame, which is the image, has been."""

Render = Callable[[list[Conversation]], Sequence[Tensor]]


def check_reasoning(conversation: Conversation, reasoning: Reasoning, rewritten: bool = False) -> None:
    """Refuse what cannot be reasoned about, before anything is read or made.

    Args:
        conversation: The request; its media may not be read yet.
        reasoning: What is to come before drawing.
        rewritten: Whether a rewriter changes the prompt.

    Raises:
        ConfigError: A frame is to be edited and the request is not the edit of one clip, or the prompt would be
            rewritten twice.
        DataError: There is no instruction.
    """
    if reasoning == "none":
        return
    if rewritten:
        raise ConfigError(
            f"reasoning {reasoning!r} beside a rewriter",
            where=conversation.key,
            why="either of them puts a prompt in the place of the instruction",
            fix="leave one of them out",
        )
    instruction(conversation)
    if reasoning == "vision":
        _only_clip(conversation)


def instruction(conversation: Conversation) -> str:
    """What a request asks for.

    Raises:
        DataError: Nothing.
    """
    if not (prompt := conversation.prompt.strip()):
        raise DataError("there is no instruction to rewrite", where=conversation.key, fix="give the request a prompt")
    return prompt


def conclusion(thought: str) -> str:
    """The prompt that a thought ends in: its last paragraph, where an empty line parts paragraphs."""
    return re.split(r"\n\s*\n", thought.strip())[-1].strip()


def unfold(conversation: Conversation) -> list[Conversation]:
    """What a sample whose reasoning is learned (``cot_text`` with loss beside a target) teaches: to think, and to draw.

    Both are what inference runs. A sample may lose its sources or its text to guidance's dropout when it learns to
    draw, and never when it learns to think.

    Args:
        conversation: A training sample.

    Returns:
        The chat that ends with the thought, without the target; and the target, asked for by the thought's
        `conclusion`. Any other sample is returned alone, as it is.
    """
    thoughts = [m.text or "" for m in conversation.messages if m.type == "cot_text" and m.has_loss]
    if not thoughts or not conversation.targets:
        return [conversation]
    chat = replace(conversation, messages=[m for m in conversation.messages if not m.is_target], text_features={})
    return [chat, conversation.with_prompt(conclusion(thoughts[-1]))]


def by_frame(conversations: Sequence[Conversation], render: Render, propagate: str = PROPAGATE) -> list[Conversation]:
    """Edit the first frame of clips, and ask for the clips to follow it.

    Args:
        conversations: Edits of one source clip each and nothing else, with pixels ``[3, T, H, W]`` uint8; explicit
            ones, as a frame alone does not tell what moves.
        render: Makes images of i2i requests, in their order, ``[3, 1, h, w]`` uint8 each.
        propagate: What the clips are asked for with.

    Returns:
        The vi2v requests: source clip, edited frame, instruction, and the target if there was one.

    Raises:
        ConfigError: A request is not the edit of one clip.
        DataError: The clip of a request has no pixels.
    """
    clips = [_only_clip(conversation) for conversation in conversations]
    for conversation, clip in zip(conversations, clips, strict=True):
        if clip.pixels is None:
            raise DataError("a clip without pixels has no frame to edit", where=conversation.key, fix="keep raw clips")
    frames = render([_of_frame(c, clip) for c, clip in zip(conversations, clips, strict=True)])
    return [
        replace(
            conversation,
            task="vi2v",
            messages=[
                Message("video", media=clip),
                Message("image", media=Media(pixels=frame)),
                Message("text", propagate),
                *conversation.targets,
            ],
            text_features={},
        )
        for conversation, clip, frame in zip(conversations, clips, frames, strict=True)
    ]


def _only_clip(conversation: Conversation) -> Media:
    sources = conversation.sources
    if len(sources) != 1 or not sources[0].is_video or conversation.spec.target != "video":
        raise ConfigError(
            f"task {conversation.task} cannot be reasoned about with a frame",
            where=conversation.key,
            why="it takes one source clip, and nothing else, to edit a frame and propagate it",
            fix="reason in text alone, or ask for v2v or mv2v",
        )
    return sources[0].media or Media()


def _of_frame(conversation: Conversation, clip: Media) -> Conversation:
    """The same edit of the clip's first frame."""
    assert clip.pixels is not None
    geometry = {"frames": 1, "fps": 0.0, "sampled": 1}
    frame = Media(pixels=clip.pixels[:, :1], source={**clip.source, **geometry} if clip.source else {})
    messages = [Message("image", media=frame), Message("text", conversation.prompt), Message("image_gen")]
    return replace(conversation, task="i2i", messages=messages, text_features={})

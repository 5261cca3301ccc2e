"""What the pipeline does before it draws: the planner reasons, a frame is edited, and what came of it is told."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from bernini.conversation import Conversation
from bernini.errors import ConfigError
from bernini.planner.conversations import ConversationPlanner
from bernini.presets import Settings
from bernini.reasoning import by_frame
from bernini.stacking import group

Edit = Callable[[list[Conversation], Sequence[int]], Sequence[Tensor]]
"""Makes images ``[3, 1, h, w]`` uint8 of i2i requests, with the seed of each."""


@dataclass(frozen=True)
class Thought:
    """What became of a prompt before anything was drawn.

    Attributes:
        asked: The prompt that was given.
        explicit: The prompt in its place; the same one where nothing came of thinking.
        text: All that the planner wrote; null if the prompt is another's.
        frame: First frame of the clip, edited as ``explicit`` says, ``[3, 1, H, W]`` uint8; null without one.
    """

    asked: str
    explicit: str
    text: str | None = None
    frame: Tensor | None = None


Thoughtful = tuple[list[Conversation], list[Thought | None]]
"""Requests that are planned and rendered in place of others, and what they come from; null for those that stayed."""


def think(
    requests: Sequence[Conversation],
    chosen: Sequence[Settings],
    seeds: Sequence[int],
    planner: ConversationPlanner | None,
    edit: Edit,
) -> Thoughtful:
    """Reason about requests as their settings ask for.

    Args:
        requests: Requests that `bernini.reasoning.check_reasoning` has seen.
        chosen: Settings of each.
        seeds: Seed of each.
        planner: Writes; it may be missing where nobody reasons.
        edit: Edits first frames.
    """
    final: list[Conversation] = [*requests]
    thoughts: list[Thought | None] = [None for _ in requests]
    for rows in group((settings.reasoning, settings.writing()) for settings in chosen):
        if chosen[rows[0]].reasoning != "none":
            assert planner is not None
            own, their_seeds = [requests[row] for row in rows], [seeds[row] for row in rows]
            made = _think_alike(own, chosen[rows[0]], their_seeds, planner, edit)
            for row, (request, thought) in zip(rows, made, strict=True):
                final[row], thoughts[row] = request, thought
    return final, thoughts


def _think_alike(
    requests: Sequence[Conversation],
    settings: Settings,
    seeds: Sequence[int],
    planner: ConversationPlanner,
    edit: Edit,
) -> Iterator[tuple[Conversation, Thought]]:
    explicit = planner.rewrite(requests, settings.writing(), seeds)
    frames: list[Tensor | None] = [None for _ in requests]

    def edited(asked: list[Conversation]) -> Sequence[Tensor]:
        frames[:] = found = edit(asked, seeds)
        return found

    final = by_frame(explicit, edited) if settings.reasoning == "vision" else explicit
    for request, said, made, frame in zip(requests, explicit, final, frames, strict=True):
        yield made, Thought(request.prompt, said.prompt, str(said.info["thought"]), frame)


def reworded(requests: Sequence[Conversation], rewritten: Sequence[Conversation]) -> Thoughtful:
    """What a rewriter made of requests.

    Raises:
        ConfigError: It made more of them, or fewer.
    """
    if len(requests) != len(rewritten):
        raise ConfigError(f"rewriting made {len(rewritten)} of {len(requests)} conversations", fix="give one for each")
    return [*rewritten], [Thought(a.prompt, b.prompt) for a, b in zip(requests, rewritten, strict=True)]

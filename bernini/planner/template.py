r"""From a conversation to the planner's tokens, exactly as the released planner was trained to read them.

A generation request is ``<|im_start|>{role}\n{content}`` per turn, with neither ``<|im_end|>`` nor a newline between
turns: the task's system message, the user's items in their order, and the assistant's target pads. A conversation whose
answer is text takes Qwen's ordinary chat form instead.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bernini.conversation import Conversation, Message
from bernini.errors import CheckpointError, ConfigError, DataError
from bernini.planner.masking import SOURCE, TARGET, TEXT
from bernini.planner.vision import Grid, TargetSize, VisionConfig, Visual, look_at, target_grid
from bernini.tasks import DEFAULT_SENTENCE, MANY, TASKS
from bernini.text.prompt import clean_prompt

IGNORED = -100
"""Label of a token that is not learned."""


@dataclass
class PlannerSample:
    """One sequence of the planner.

    Attributes:
        ids: ``[n]`` int64 token ids; a visual's tokens are Qwen's image or video pads.
        token_type: ``[n]`` int64: 0 text, 2 source visual, 3 target visual.
        segment_id: ``[n]`` int64: a visual's number in the conversation, from 1; elsewhere the token's index.
        position_ids: ``[3, n]`` int64 M-RoPE positions (time, height, width).
        labels: ``[n]`` int64: the token's own id where it is learned, else -100; shift them by one to predict.
        visuals: What the pads of known visuals stand for, in the order of their tokens.
        target_grid: ``(t, h, w)`` of the target in tokens; ``None`` for a text answer.
    """

    ids: Tensor
    token_type: Tensor
    segment_id: Tensor
    position_ids: Tensor
    labels: Tensor
    visuals: list[Visual]
    target_grid: Grid | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class PlannerPack:
    """Several sequences laid end to end; tensors are those of `PlannerSample`, one after the other.

    Attributes:
        ids: ``[n]``.
        token_type: ``[n]``.
        segment_id: ``[n]``; unique inside a sample only.
        position_ids: ``[3, n]``; they start again at 0 with every sample.
        labels: ``[n]``.
        sample: ``[n]`` int64 number of the sequence that a token belongs to, by which attention keeps them apart.
        visuals: Known visuals of all samples, in the order of their tokens.
        target_grids: Grid of every sample's target.
    """

    ids: Tensor
    token_type: Tensor
    segment_id: Tensor
    position_ids: Tensor
    labels: Tensor
    sample: Tensor
    visuals: list[Visual]
    target_grids: list[Grid | None]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PlannerPack":
        """A copy with every tensor, those of the visuals included, on ``device``."""
        patches = [visual.patches for visual in self.visuals]
        # All at once: a small copy takes as long as a large one.
        sent = (
            torch.cat(patches).to(device, non_blocking=non_blocking).split(list(map(len, patches))) if patches else ()
        )
        visuals = [
            replace(visual, patches=rows).to(device, non_blocking)
            for visual, rows in zip(self.visuals, sent, strict=True)
        ]
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.type is Tensor}
        moved = {name: x.to(device, non_blocking=non_blocking) for name, x in tensors.items()}
        return replace(self, **moved, visuals=visuals)


def pack(samples: Sequence[PlannerSample]) -> PlannerPack:
    """Lay sequences end to end."""
    return PlannerPack(
        ids=torch.cat([s.ids for s in samples]),
        token_type=torch.cat([s.token_type for s in samples]),
        segment_id=torch.cat([s.segment_id for s in samples]),
        position_ids=torch.cat([s.position_ids for s in samples], dim=1),
        labels=torch.cat([s.labels for s in samples]),
        sample=torch.repeat_interleave(torch.tensor([len(s) for s in samples])),
        visuals=[v for s in samples for v in s.visuals],
        target_grids=[s.target_grid for s in samples],
    )


@dataclass(frozen=True)
class Run:
    """The tokens of one visual, which stand together.

    Attributes:
        number: The visual's number in the conversation, from 1.
        grid: ``(t, h, w)`` in tokens.
        is_video: Whether it is a clip.
        is_target: Whether it is to be planned.
        visual: Its patches, if they are known.
    """

    number: int
    grid: Grid
    is_video: bool
    is_target: bool
    visual: Visual | None = None

    @property
    def tokens(self) -> int:
        """How many there are."""
        return math.prod(self.grid)


Item = tuple[Literal["system", "user", "assistant"], str | Run]


def rope_positions(runs: Iterable[int | Run], tokens_per_second: float) -> Tensor:
    """Qwen2.5-VL's three-axis positions, with a second to every step of a clip's grid.

    Text counts on by one along all axes. A visual's tokens lie on their grid from the next free position on, and what
    follows starts behind the largest position in use. So it was when the released planner was trained; transformers
    from 5 on starts behind the largest row or column, which differs after a clip that is longer than it is wide.

    Args:
        runs: Numbers of text tokens, and visuals, in order.
        tokens_per_second: Temporal positions per second.

    Returns:
        ``[3, n]`` int64: time, height, width.
    """
    parts, start = [torch.zeros(3, 0, dtype=torch.long)], 0
    for is_text, group in groupby(runs, key=lambda run: isinstance(run, int)):
        if is_text:
            tokens = sum(cast(Iterable[int], group))
            laid = [(torch.arange(tokens).expand(3, -1), tokens)]
        else:
            laid = [_on_grid(run.grid, tokens_per_second) for run in cast(Iterable[Run], group)]
        for positions, extent in laid:
            parts.append(positions + start)
            start += extent
    return torch.cat(parts, dim=1)


@lru_cache(maxsize=1024)
def _on_grid(grid: Grid, tokens_per_second: float) -> tuple[Tensor, int]:
    """``[3, n]`` positions of a visual that starts at 0, and the first free position behind."""
    time, *space = (torch.arange(edge) for edge in grid)
    positions = torch.stack(torch.meshgrid((time * tokens_per_second).long(), *space, indexing="ij")).flatten(1)
    return positions, int(positions.max()) + 1


@lru_cache(maxsize=4096)
def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of a text; the fixed ones are in every sample."""
    return tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


class PlannerTemplate:
    """Writes conversations as the planner reads them.

    The released template first writes numbered placeholder tokens and then overwrites them with Qwen's pads; this one
    writes the pads, which gives the same ids and leaves the tokenizer as it was. Text that spells a special token stays
    text.

    Args:
        tokenizer: Qwen's, or any with its special tokens.
        vision: Numbers of the vision tower.
        max_text: Most text tokens of one sequence, those of the form included.

    Raises:
        ConfigError: The tokenizer lacks one of Qwen's special tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vision: VisionConfig | None = None, max_text: int = 4096
    ) -> None:
        self.tokenizer = tokenizer
        self.vision = vision or VisionConfig()
        self.max_text = max_text
        self.im_start, self.im_end = self._special("im_start"), self._special("im_end")
        self.vision_start, self.vision_end = self._special("vision_start"), self._special("vision_end")
        self.image_pad, self.video_pad = self._special("image_pad"), self._special("video_pad")

    @classmethod
    def from_pretrained(cls, tokenizer: str, vision: VisionConfig | None = None) -> "PlannerTemplate":
        """Read a tokenizer's folder.

        Raises:
            CheckpointError: It holds none.
            ConfigError: The tokenizer lacks one of Qwen's special tokens.
        """
        if not (Path(tokenizer) / "tokenizer_config.json").is_file():
            raise CheckpointError(
                "no tokenizer here", where=tokenizer, fix="point at a folder of Qwen2.5-VL's tokenizer"
            )
        return cls(AutoTokenizer.from_pretrained(tokenizer, local_files_only=True), vision)

    def __call__(self, conversation: Conversation, size: TargetSize | None = None) -> PlannerSample:
        """Write a sample: a visual to plan or, where the answer is a text with loss, a chat.

        The grid of a target is that of its own pixels; without any, a clip takes the first source video's, and
        everything else the asked one.

        Args:
            conversation: Sources with pixels, text, and the answer. If it has none, the target is what the task makes.
                ``special_token`` messages are passed over. Beside a target, reasoning is text that is given, as
                released; `bernini.reasoning.unfold` makes what learns it.
            size: Size of a target that nothing else gives one.

        Returns:
            The sequence. Only a chat has labels, on the answer and the token that ends it.

        Raises:
            ConfigError: There is no answer, and the task is unknown; or a visual was prepared with other numbers.
            DataError: A visual has no pixels or no size, or there are too many visuals, targets or tokens of text.
        """
        chat = not conversation.targets and any(m.has_loss and _is_text(m) for m in conversation.messages)
        conversation = conversation if chat else _with_target(conversation)
        return self._write(conversation, self._items(conversation, size, chat), chat)

    def question(self, conversation: Conversation) -> PlannerSample:
        """Write what a chat says before its answer, up to the place where the answer begins.

        Args:
            conversation: Sources with pixels, and text. What is learned is passed over, an answer or a target.

        Returns:
            The beginning of the chat in which the answer would be learned, without labels.

        Raises:
            DataError: As when the chat is called with.
        """
        given = replace(conversation, messages=[m for m in conversation.messages if not m.has_loss])
        return self._write(given, self._items(given, None, chat=True), chat=True, asks=True)

    def streams(
        self, conversation: Conversation, negative: str = "", size: TargetSize | None = None
    ) -> dict[str, PlannerSample]:
        """Write the three sequences that planning guides with.

        As in the released pipeline, the prompt is cleaned and the negative prompt is not, and a visual keeps its number
        where others are left out.

        Args:
            conversation: The request; its target may be missing.
            negative: What ``uncond`` says in place of all text; empty for nothing.
            size: Size of a target that nothing else gives one.

        Returns:
            ``cond``, the whole request; ``uncond``, with the negative prompt alone; ``imgcond``, without the sources.
            All have the system message and the target.

        Raises:
            ConfigError: There is no target, and the task is unknown.
            DataError: As when the request is called with.
        """
        conversation = _with_target(conversation)
        items = self._items(conversation, size)
        without_sources = [(role, x) for role, x in items if isinstance(x, str) or x.is_target]
        target = [(role, x) for role, x in without_sources if isinstance(x, Run)]
        return {
            "cond": self._write(conversation, items, clean=True),
            "uncond": self._write(conversation, [("user", negative), *target]),
            "imgcond": self._write(conversation, without_sources, clean=True),
        }

    def _items(self, conversation: Conversation, size: TargetSize | None, chat: bool = False) -> list[Item]:
        """Texts and visuals in order, with who says them."""
        runs = self._runs(conversation, size)
        items: list[Item] = []
        for message in conversation.messages:
            if message.type == "special_token":
                continue
            # Reasoning is given to a planner of visuals, and learned by one that answers in words.
            says = message.has_loss and (chat or message.type != "cot_text")
            role: Literal["user", "assistant"] = "assistant" if says else "user"
            items.append((role, message.text or "" if _is_text(message) else next(runs)))
        return items

    def _runs(self, conversation: Conversation, size: TargetSize | None) -> Iterator[Run]:
        messages, key, merge = conversation.visual, conversation.key, self.vision.merge
        if len(messages) > MANY:
            raise DataError(
                f"{len(messages)} images and clips in one sample",
                where=key,
                why=f"the planner numbers at most {MANY}, the target included",
                fix="leave some out",
            )
        if len(conversation.targets) > 1:
            why = "the planner plans one visual at a time"
            raise DataError(f"{len(conversation.targets)} targets in one sample", where=key, why=why)
        known = [look_at(message, self.vision, key) for message in messages]
        videos = [v.grid for m, v in zip(messages, known, strict=True) if v and m.is_video and not m.is_target]
        for number, (message, visual) in enumerate(zip(messages, known, strict=True), 1):
            if visual is not None:
                grid = visual.grid
            elif not message.is_target:
                fix = "keep raw media in the shards, or prepare them with `--planner`"
                raise DataError(f"a source {message.type} has no pixels", where=key, fix=fix)
            elif message.is_video and videos:
                grid = videos[0]
            elif size is not None:
                grid = target_grid(size, message.is_video, self.vision)
            else:
                fix = "give it pixels, or ask for a height, a width and, for a clip, a number of frames"
                raise DataError(
                    "the target has no size", where=key, why="nothing says how many tokens to plan", fix=fix
                )
            t, h, w = grid
            yield Run(number, (t, h // merge, w // merge), message.is_video, message.is_target, visual)

    def _write(
        self,
        conversation: Conversation,
        items: Sequence[Item],
        chat: bool = False,
        clean: bool = False,
        asks: bool = False,
    ) -> PlannerSample:
        task = TASKS.get(conversation.task)
        system: Item = ("system", task.planner_sentence if task else DEFAULT_SENTENCE)
        runs: list[int | Run] = []
        ids: list[int] = []
        labels: list[int] = []

        def write(run: int | Run, tokens: Sequence[int], learned: bool = False) -> None:
            runs.append(run)
            ids.extend(tokens)
            labels.extend(tokens if learned else [IGNORED] * len(tokens))

        def write_text(tokens: Sequence[int], learned: bool = False) -> None:
            write(len(tokens), tokens, learned)

        def begin(role: str) -> None:
            write_text([self.im_start, *_encode(self.tokenizer, f"{role}\n")])

        for role, turn in groupby([system, *items], key=lambda item: item[0]):
            content = _content((x for _, x in turn), clean)
            if not content:
                continue
            answer = chat and role == "assistant"
            begin(role)
            for part in content:
                if isinstance(part, str):
                    write_text(_encode(self.tokenizer, part), answer)
                else:
                    write_text([self.vision_start])
                    write(part, [self.video_pad if part.is_video else self.image_pad] * part.tokens)
                    write_text([self.vision_end])
            if chat:
                write_text([self.im_end], answer)
                write_text(_encode(self.tokenizer, "\n"))
        if asks:
            begin("assistant")
        return self._sample(conversation, runs, ids, labels)

    def _sample(
        self, conversation: Conversation, runs: list[int | Run], ids: list[int], labels: list[int]
    ) -> PlannerSample:
        if (texts := sum(run for run in runs if isinstance(run, int))) > self.max_text:
            raise DataError(
                f"{texts} tokens of text in one sample",
                where=conversation.key,
                why=f"the planner takes at most {self.max_text}",
                fix="shorten the text, or raise max_text",
            )
        token_type: list[int] = []
        segment_id: list[int] = []
        for run in runs:
            if isinstance(run, int):
                token_type += [TEXT] * run
                segment_id += range(len(segment_id), len(segment_id) + run)
            else:
                token_type += [TARGET if run.is_target else SOURCE] * run.tokens
                segment_id += [run.number] * run.tokens
        visuals = [run for run in runs if isinstance(run, Run)]
        return PlannerSample(
            ids=torch.tensor(ids),
            token_type=torch.tensor(token_type),
            segment_id=torch.tensor(segment_id),
            position_ids=rope_positions(runs, self.vision.tokens_per_second),
            labels=torch.tensor(labels),
            visuals=[run.visual for run in visuals if run.visual is not None],
            target_grid=next((run.grid for run in visuals if run.is_target), None),
        )

    def _special(self, name: str) -> int:
        token = f"<|{name}|>"
        found = self.tokenizer.convert_tokens_to_ids(token)
        if not isinstance(found, int) or found == self.tokenizer.unk_token_id:
            raise ConfigError(f"the tokenizer has no {token}", fix="use the tokenizer of Qwen2.5-VL")
        return found


def _is_text(message: Message) -> bool:
    return message.type in ("text", "cot_text")


def _with_target(conversation: Conversation) -> Conversation:
    """The conversation with an answer: a visual of the task's kind, without pixels, if it has none."""
    if conversation.targets:
        return conversation
    target = Message("image_gen" if conversation.spec.target == "image" else "video_gen")
    return replace(conversation, messages=[*conversation.messages, target])


def _content(parts: Iterable[str | Run], clean: bool) -> list[str | Run]:
    """What one turn says: neighbouring texts joined by nothing, blanks stripped from both ends of it all."""
    content: list[str | Run] = []
    for is_text, group in groupby(parts, key=lambda part: isinstance(part, str)):
        if is_text:
            text = "".join(part for part in group if isinstance(part, str))
            content.append(clean_prompt(text) if clean else text)
        else:
            content += group
    if content and isinstance(content[0], str):
        content[0] = content[0].lstrip()
    if content and isinstance(content[-1], str):
        content[-1] = content[-1].rstrip()
    return [part for part in content if part]

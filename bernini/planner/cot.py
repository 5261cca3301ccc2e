"""The planner puts into words what it is asked for, by its language head: the prompt that it then plans from."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from bernini.conversation import Conversation
from bernini.errors import ConfigError
from bernini.planner.model import PlannerModel
from bernini.planner.template import PlannerTemplate
from bernini.reasoning import conclusion, instruction


@dataclass(frozen=True)
class WritingConfig:
    """How text is written.

    Attributes:
        max_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token every time; above that tokens are drawn, from flatter distributions the
            higher it is.
        top_p: Draw from the fewest tokens that have so much probability together.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}", why="an answer has at least one token")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature is {self.temperature} and top_p {self.top_p}",
                why="a temperature is at least 0, and top_p a probability above 0",
            )


@dataclass(frozen=True)
class Answer:
    """What the planner said.

    Attributes:
        text: Without special tokens and blanks at its ends.
        ended: Whether it came to an end by itself.
    """

    text: str
    ended: bool


class _Drawn(LogitsProcessor):
    """Noise that makes the largest logit a draw from the distribution (Gumbel-max), for each row by its own seed."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self.generators]
        return scores - torch.stack(draws).to(scores.device).log()


@torch.no_grad()
def answer(
    model: PlannerModel,
    template: PlannerTemplate,
    conversations: Sequence[Conversation],
    config: WritingConfig | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """Answer conversations in words, all in one batch with a key and value cache.

    Args:
        model: The planner.
        template: Writes the conversations.
        conversations: Sources with pixels, and text, of any sizes; what is learned is passed over.
        config: How to write; greedily if null.
        seeds: Seed of each answer where tokens are drawn, 42 if null. What is drawn does not depend on the company.

    Raises:
        ConfigError: The planner is in training mode.
        DataError: As `PlannerTemplate.question`.
    """
    config = config or WritingConfig()
    if model.training:
        raise ConfigError(
            "writing with a planner in training mode",
            why="dropout would be on, and gradient checkpointing would drop the cache",
            fix="call .eval() first",
        )
    if not conversations:
        return []
    streams = model.streams([template.question(conversation) for conversation in conversations])
    longest = max(len(stream.embeds) for stream in streams)
    before = [longest - len(stream.embeds) for stream in streams]  # each ends where its answer begins
    embeds = torch.stack([pad(s.embeds, (0, 0, gap, 0)) for s, gap in zip(streams, before, strict=True)])
    positions = torch.stack([pad(s.position_ids, (gap, 0)) for s, gap in zip(streams, before, strict=True)], 1)
    known = torch.arange(longest, device=embeds.device) >= torch.tensor(before, device=embeds.device)[:, None]

    drawn = LogitsProcessorList()
    if config.temperature:
        drawn += [TemperatureLogitsWarper(config.temperature), TopPLogitsWarper(config.top_p)]
        drawn += [_Drawn(seeds or [42] * len(streams))]
    stops = {template.im_end, template.tokenizer.eos_token_id} - {None}
    # The text model sees sources causally, as it does whatever precedes a plan; so 2-D masks are all it takes.
    mllm: Any = model.mllm  # `generate` is typed for a protocol
    said: Tensor = mllm.generate(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=known.long(),
        logits_processor=drawn,
        generation_config=GenerationConfig(
            max_new_tokens=config.max_tokens,
            do_sample=False,
            eos_token_id=sorted(stops),
            pad_token_id=template.im_end,
        ),
    )
    return [_read(ids, stops, template) for ids in said.tolist()]


def _read(ids: list[int], stops: set[int], template: PlannerTemplate) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    text = cast(str, template.tokenizer.decode(ids[:end], skip_special_tokens=True))
    return Answer(text.strip(), end is not None)


def rewrite(
    model: PlannerModel,
    template: PlannerTemplate,
    conversations: Sequence[Conversation],
    config: WritingConfig | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Conversation]:
    """Have the planner reason about instructions, and put what it concludes in their place.

    An instruction stays where the planner comes to no end or to nothing, and a warning says so.

    Args:
        model: See `answer`.
        template: See there.
        conversations: Requests with a prompt.
        config: See there.
        seeds: See there.

    Returns:
        The requests with the `conclusion` as their prompt; ``info["thought"]`` is all that was written.

    Raises:
        ConfigError: The planner is in training mode.
        DataError: A request has no prompt, or is none that the template writes.
    """
    for conversation in conversations:
        instruction(conversation)
    rewritten = []
    for request, said in zip(conversations, answer(model, template, conversations, config, seeds), strict=True):
        thinking = replace(request, info={**request.info, "thought": said.text})
        prompt = conclusion(said.text) if said.ended else ""
        if not prompt:
            reason = "nothing" if said.ended else "no end"
            where = f"{request.key}: " if request.key else ""
            warnings.warn(f"{where}the planner's reasoning came to {reason}; the prompt stays", stacklevel=2)
        rewritten.append(thinking.with_prompt(prompt) if prompt else thinking)
    return rewritten

"""Thinking in the pipeline: what is planned and rendered is what was thought, and the output tells it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planners import write_planner_folder

from bernini.conversation import Conversation, Message
from bernini.errors import ConfigError, DataError
from bernini.pipeline import BerniniPipeline, BerniniPipelineOutput
from bernini.planner.conversations import ConversationPlanner
from bernini.reasoning import PROPAGATE, by_frame, conclusion
from bernini.thinking import Thought
from datamodules.toyworld import make_item

TOY = Path(__file__).parents[2] / "assets" / "toy"
FAST = {"steps": 2, "frames": 5, "height": 32, "width": 32, "planning_steps": 2, "planning_flow_steps": 1}
DRAWN = {"reasoning_tokens": 12, "reasoning_temperature": 100.0}  # so warm that all tokens are equally likely
ENDS, ENDS_TOO, ENDLESS = 75, 155, 0  # seeds by whether an end is among twelve of them


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random planner: what it writes is noise."""
    return write_planner_folder(tmp_path_factory.mktemp("planner"), gen_dim=64)


@pytest.fixture(scope="module")
def load(planner: Path) -> Callable[[], BerniniPipeline]:
    """Reads the toy family with that planner."""

    def read() -> BerniniPipeline:
        pipeline = BerniniPipeline.from_pretrained(TOY, planner=ConversationPlanner.from_pretrained(planner))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return read


@pytest.fixture(scope="module")
def make(load: Callable[[], BerniniPipeline]) -> Callable[..., BerniniPipelineOutput]:
    """Calls the pipeline with settings that take no time."""
    pipeline = load()

    def call(*args: Any, **kwargs: Any) -> BerniniPipelineOutput:
        made = pipeline(*args, **{**FAST, **DRAWN, **kwargs})
        assert isinstance(made, BerniniPipelineOutput)
        return made

    return call


def asked(task: str = "v2v", number: int = 0) -> Conversation:
    """A request: sources and text, no target."""
    item = make_item(task, number, frames=5, height=32, width=48)
    return replace(item, messages=[m for m in item.messages if not m.is_target])


def same(one: BerniniPipelineOutput, other: BerniniPipelineOutput) -> bool:
    assert one.plans is not None and other.plans is not None
    plans = zip(one.plans, other.plans, strict=True)
    videos = zip(one.videos, other.videos, strict=True)
    return all(torch.equal(a.embeds, b.embeds) for a, b in plans) and all(torch.equal(a, b) for a, b in videos)


def test_what_is_written_is_planned_and_rendered(make: Callable[..., BerniniPipelineOutput]) -> None:
    request = asked()
    made = make(request, reasoning="text", seed=ENDS)
    (thought,) = made.thoughts
    assert thought is not None and thought.text and thought.asked == request.prompt and thought.frame is None
    assert thought.explicit == conclusion(thought.text) == made.conversations[0].prompt != request.prompt
    assert same(made, make(request.with_prompt(thought.explicit), seed=ENDS))
    plain = make(request, seed=ENDS)
    assert plain.thoughts == [None] and not same(made, plain)
    assert made.thoughts == make(request, reasoning="text", seed=ENDS).thoughts
    assert made.thoughts != make(request, reasoning="text", seed=ENDS_TOO).thoughts


def test_a_thought_without_an_end_keeps_the_prompt(make: Callable[..., BerniniPipelineOutput]) -> None:
    request = replace(asked(), key="")
    with pytest.warns(UserWarning, match="^the planner's reasoning came to no end; the prompt stays"):
        made = make(request, reasoning="text", seed=ENDLESS)
    (thought,) = made.thoughts
    assert thought is not None and thought.text and thought.explicit == thought.asked == request.prompt
    assert same(made, make(request, seed=ENDLESS))


def test_a_frame_is_edited_by_the_thought_and_then_propagated(make: Callable[..., BerniniPipelineOutput]) -> None:
    request = asked("mv2v")
    made = make(request, reasoning="vision", seed=ENDS)
    (thought,), (rendered,) = made.thoughts, made.conversations
    assert thought is not None and thought.frame is not None
    assert (rendered.task, rendered.prompt, made.settings[0].mode) == ("vi2v", PROPAGATE, "rv2v_wapg")
    explicit = make(request, reasoning="text", seed=ENDS).conversations[0]
    assert thought.explicit == explicit.prompt

    frames: list[Conversation] = []
    by_frame([explicit], lambda requests: [frames.extend(requests) or thought.frame])
    edited = make(frames, seed=ENDS)  # as if one had asked for it: with i2i's settings, and a plan
    assert edited.settings[0].mode == "vae_txt_vit_wapg" and thought.frame.shape == (3, 1, 32, 48)
    assert torch.equal(edited.videos[0], thought.frame)
    (led,) = by_frame([explicit], lambda requests: edited.videos)
    assert same(made, make(led, seed=ENDS))


def test_many_think_as_each_alone(make: Callable[..., BerniniPipelineOutput]) -> None:
    requests, seeds = [asked("v2v", 1), asked("mv2v", 2), asked("v2v", 3)], [ENDS, ENDS_TOO, ENDS]
    together = make(requests, reasoning="vision", seeds=seeds)
    for number, (request, seed) in enumerate(zip(requests, seeds, strict=True)):
        alone = make(request, reasoning="vision", seed=seed)
        one, other = alone.thoughts[0], together.thoughts[number]
        assert one is not None and other is not None and one.frame is not None and other.frame is not None
        assert replace(one, frame=None) == replace(other, frame=None)
        assert (one.frame.int() - other.frame.int()).abs().max() <= 1
        # A frame of other rounding is another source, of which a random planner makes much.
        assert (alone.videos[0].int() - together.videos[number].int()).abs().max() <= 2
    assert make([], reasoning="vision").videos == []


def test_a_plan_of_what_was_thought_is_rendered_again(make: Callable[..., BerniniPipelineOutput]) -> None:
    for reasoning in ("text", "vision"):
        first = make(asked(), reasoning=reasoning, seed=ENDS)
        assert same(first, make(asked(), reasoning=reasoning, seed=ENDS, plans=first.plans))


def test_a_rewriter_is_told_too(make: Callable[..., BerniniPipelineOutput]) -> None:
    made = make(asked(), rewrite=lambda conversations: [c.with_prompt("make it blue") for c in conversations])
    assert made.thoughts == [Thought(asked().prompt, "make it blue")]
    with pytest.raises(ConfigError, match="rewriting made 2 of 1 conversations"):
        make(asked(), rewrite=lambda conversations: [*conversations, *conversations])


def test_offloaded_weights_come_to_think(
    load: Callable[[], BerniniPipeline], make: Callable[..., BerniniPipelineOutput]
) -> None:
    pipeline = load()
    pipeline.enable_model_cpu_offload(device="cpu")  # the hooks run, though there is nothing to move to
    assert pipeline.planner is not None
    hook: Any = pipeline.planner._hf_hook
    before, calls = hook.pre_forward, []
    hook.pre_forward = lambda *args, **kwargs: (calls.append(args[0]), before(*args, **kwargs))[1]
    made = pipeline(asked(), reasoning="vision", seed=ENDS, **FAST, **DRAWN)
    assert isinstance(made, BerniniPipelineOutput)
    assert calls == [pipeline.planner] * 3  # to write, to plan the frame, and to plan the clip
    there = make(asked(), reasoning="vision", seed=ENDS)
    assert made.thoughts[0] is not None and there.thoughts[0] is not None
    assert made.thoughts[0].text == there.thoughts[0].text
    # Weights that moved lie elsewhere in memory, where products are rounded otherwise.
    assert (made.videos[0].int() - there.videos[0].int()).abs().max() <= 1


def test_an_interrupted_frame_interrupts_all(make: Callable[..., BerniniPipelineOutput]) -> None:
    seen: list[int] = []

    def stop(pipe: BerniniPipeline, step: int, timestep: int, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        pipe._interrupt = True
        return {}

    make(asked(), reasoning="vision", seed=ENDS, steps=4, callback_on_step_end=stop)
    assert seen == [0, 0]  # of the frame, and of the clip


@pytest.mark.parametrize(
    ("task", "arguments", "error", "what"),
    [
        ("v2v", {"reasoning": "aloud"}, ConfigError, "unknown reasoning 'aloud'"),
        ("v2v", {"reasoning": "text", "plan": False}, ConfigError, "reasoning 'text' without a planner"),
        ("rv2v", {"reasoning": "vision"}, ConfigError, "task rv2v cannot be reasoned about with a frame"),
        ("t2i", {"reasoning": "vision"}, ConfigError, "task t2i cannot be reasoned about with a frame"),
        ("v2v", {"reasoning": "text", "rewrite": list}, ConfigError, "reasoning 'text' beside a rewriter"),
        ("v2v", {"reasoning": "vision", "rewrite": list}, ConfigError, "reasoning 'vision' beside a rewriter"),
        ("v2v", {"reasoning_tokens": 0}, ConfigError, "reasoning_tokens is 0"),
        ("v2v", {"reasoning_temperature": -1.0}, ConfigError, "reasoning_temperature is -1"),
    ],
)
def test_what_does_not_go_together_is_refused(
    make: Callable[..., BerniniPipelineOutput],
    task: str,
    arguments: dict[str, Any],
    error: type[Exception],
    what: str,
) -> None:
    with pytest.raises(error, match=what):
        make(asked(task), **arguments)


def test_silence_is_not_thought_about(make: Callable[..., BerniniPipelineOutput]) -> None:
    silent = Conversation("t2v", [Message("text", " ")], key="case-3")
    with pytest.raises(DataError, match="no instruction to rewrite") as caught:
        make(silent, reasoning="text")
    assert caught.value.where == "case-3"

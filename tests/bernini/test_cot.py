"""Text by the planner's language head: greedy and drawn, in batches of unlike samples, and what becomes of prompts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from planners import SIZE, make_planner

from bernini.conversation import Conversation, Media, Message
from bernini.errors import ConfigError, DataError
from bernini.planner.cot import Answer, WritingConfig, answer, rewrite
from bernini.planner.module import PlannerModule
from bernini.planner.template import pack
from datamodules.toyworld import make_item, make_question

# Clips of unlike lengths, images, no sources at all; and a clip longer than it is wide, after which positions jump.
REQUESTS = [
    make_item("v2v", 0, edits=["cot"], frames=9, height=64, width=64),
    make_item("rv2v", 1, **SIZE),
    make_item("t2i", 2, **SIZE),
    make_question("und_vid", 3, frames=33, height=32, width=32),
    make_item("r2i", 4, references=3, **SIZE),
]
SHORT = WritingConfig(max_tokens=12)


@pytest.fixture(scope="module")
def module() -> PlannerModule:
    """A tiny planner whose random words are far enough apart to tell."""
    torch.manual_seed(1)
    module = make_planner()
    with torch.no_grad():
        module.planner.mllm.lm_head.weight.normal_(std=1.0)
        for weight in module.planner.text.parameters():
            weight.mul_(3 if weight.ndim > 1 else 1)
    module.planner.eval()
    return module


def ask(module: PlannerModule, requests: Sequence[Conversation], *more: object) -> list[Answer]:
    return answer(module.planner, module.template, requests, *more)  # type: ignore[arg-type]


@torch.no_grad()
def slowly(module: PlannerModule, request: Conversation, tokens: int) -> str:
    """What is said when every token is the likeliest by a whole forward of training, without any cache."""
    asked = module.template.question(request)
    said: list[int] = []
    while len(said) < tokens and (not said or said[-1] != module.template.im_end):
        ids = torch.cat([asked.ids, torch.tensor([*said, 0], dtype=torch.long)])
        extra = len(said) + 1
        last = asked.position_ids[:, -1:]
        whole = replace(
            asked,
            ids=ids,
            token_type=torch.cat([asked.token_type, torch.zeros(extra, dtype=torch.long)]),
            segment_id=torch.cat([asked.segment_id, torch.arange(len(asked), len(ids))]),
            position_ids=torch.cat([asked.position_ids, last + torch.arange(1, extra + 1)], 1),
            labels=torch.cat([torch.full((len(ids) - 1,), -100), torch.zeros(1, dtype=torch.long)]),
        )
        said.append(int(module.planner(pack([whole])).logits[-1].argmax()))
    end = [token for token in said if token != module.template.im_end]
    return module.template.tokenizer.decode(end, skip_special_tokens=True).strip()


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_greedy_writing_is_the_argmax_of_uncached_forwards_alone_and_in_company(
    number: int, module: PlannerModule
) -> None:
    expected = slowly(module, REQUESTS[number], SHORT.max_tokens)
    assert expected
    assert ask(module, [REQUESTS[number]], SHORT)[0].text == expected
    assert ask(module, REQUESTS, SHORT)[number].text == expected


def test_drawn_tokens_depend_on_their_seed_and_not_on_their_company(module: PlannerModule) -> None:
    warm = WritingConfig(max_tokens=8, temperature=1.5, top_p=0.9)
    seeds = [5, 6, 7, 8, 9]
    together = ask(module, REQUESTS, warm, seeds)
    assert together == [ask(module, [r], warm, [seed])[0] for r, seed in zip(REQUESTS, seeds, strict=True)]
    assert together != ask(module, REQUESTS, warm, [seed + 10 for seed in seeds])
    assert ask(module, REQUESTS, warm) == ask(module, REQUESTS, warm, [42] * 5)


def test_tokens_are_drawn_as_often_as_they_are_likely(module: PlannerModule) -> None:
    question = module.template.question(REQUESTS[2])
    labels = torch.full((len(question) + 1,), -100)
    labels[-1] = 0
    whole = replace(
        question,
        ids=torch.cat([question.ids, torch.tensor([0])]),
        token_type=torch.cat([question.token_type, torch.tensor([0])]),
        segment_id=torch.arange(len(question) + 1),
        position_ids=torch.cat([question.position_ids, question.position_ids[:, -1:] + 1], 1),
        labels=labels,
    )
    with torch.no_grad():
        likely = (module.planner(pack([whole])).logits[0] / 2.0).softmax(0)
    top = likely.argsort(descending=True)
    kept = top[: int((likely[top].cumsum(0) < 0.6).sum()) + 1]
    expected = {
        module.template.tokenizer.decode(token).strip(): float(likely[token] / likely[kept].sum()) for token in kept
    }
    count = 600
    said = ask(module, [REQUESTS[2]] * count, WritingConfig(1, temperature=2.0, top_p=0.6), range(count))
    found = Counter(one.text for one in said)
    assert set(found) <= set(expected) and len(found) > 3
    for word in list(expected)[:3]:
        deviation = (expected[word] * (1 - expected[word]) / count) ** 0.5
        assert found[word] / count == pytest.approx(expected[word], abs=4 * deviation)


def test_hardly_warm_and_barely_open_is_greedy(module: PlannerModule) -> None:
    greedy = ask(module, REQUESTS, SHORT)
    assert ask(module, REQUESTS, WritingConfig(12, temperature=1e-4)) == greedy
    assert ask(module, REQUESTS, WritingConfig(12, temperature=1.0, top_p=1e-6)) == greedy


@pytest.fixture(scope="module")
def taught() -> tuple[PlannerModule, list[Conversation]]:
    """A planner that knows a few thoughts by heart."""
    samples = [make_item(task, n, edits=["cot"], **SIZE) for n, task in enumerate(("v2v", "i2i", "v2v"))]
    module = make_planner(recompute="none")
    optimizer = torch.optim.AdamW(module.trainable(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        loss, table = module.losses(samples, [("test", n) for n in range(3)], train=False)
        loss.backward()
        optimizer.step()
    assert table.means()["thoughts"] == 1
    module.planner.eval()
    return module, samples


def test_what_was_learned_is_written_and_becomes_the_prompt(taught: tuple[PlannerModule, list[Conversation]]) -> None:
    module, samples = taught
    requests = [replace(s, messages=[m for m in s.messages if m.type != "cot_text"]) for s in samples]
    for request, sample in zip(requests, samples, strict=True):  # the true target and the thought are not looked at
        assert ask(module, [request]) == ask(module, [sample]) == [Answer(sample.messages[2].text, True)]
    for request, sample, made in zip(
        requests, samples, rewrite(module.planner, module.template, requests), strict=True
    ):
        assert made.prompt == sample.info["explicit"] != request.prompt
        assert made.info["thought"] == sample.messages[2].text and made.info["truth"] == sample.info["truth"]
        assert made.sources == request.sources and made.targets == request.targets and made.task == request.task


def test_a_thought_without_an_end_changes_nothing(taught: tuple[PlannerModule, list[Conversation]]) -> None:
    module, samples = taught
    with pytest.warns(UserWarning, match="v2v-000000: the planner's reasoning came to no end; the prompt stays"):
        (made,) = rewrite(module.planner, module.template, samples[:1], WritingConfig(max_tokens=5))
    assert made.messages == samples[0].messages and samples[0].messages[2].text.startswith(made.info["thought"])


def test_special_tokens_are_not_said(module: PlannerModule) -> None:
    head, one = module.planner.mllm.lm_head, WritingConfig(max_tokens=1)
    kept, seen = head.weight.detach().clone(), []
    hook = head.register_forward_hook(lambda _, given, __: seen.append(given[0][0, -1]))
    ask(module, REQUESTS[:1], one)
    hook.remove()
    with torch.no_grad():
        head.weight[module.template.image_pad] = seen[0] * kept.norm(dim=1).max()  # now the likeliest by far
        assert (head.weight @ seen[0]).argmax() == module.template.image_pad
        said = ask(module, REQUESTS[:1], one)
        head.weight.copy_(kept)
    assert said == [Answer("", False)]


def test_what_cannot_be_written_is_refused(module: PlannerModule) -> None:
    assert ask(module, []) == []
    with pytest.raises(DataError, match="no instruction to rewrite") as empty:
        rewrite(module.planner, module.template, [Conversation("t2v", [Message("text", " ")], key="case-3")])
    assert empty.value.where == "case-3"
    unseen = Conversation("v2v", [Message("video", media=Media(path="a.mp4")), Message("text", "x")], key="case-4")
    with pytest.raises(DataError, match="source video has no pixels"):
        ask(module, [unseen])
    with pytest.raises(ConfigError, match="training mode"):
        ask(make_planner(), REQUESTS[:1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_tokens": 0}, "max_tokens is 0"), ({"temperature": -1.0}, "temperature is -1"), ({"top_p": 0.0}, "top_p 0")],
)
def test_settings_out_of_range_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WritingConfig(**settings)  # type: ignore[arg-type]

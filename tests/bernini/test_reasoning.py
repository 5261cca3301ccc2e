"""Reasoning as changes of requests: prompts, what a sample with reasoning teaches, and edits by one frame."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planners import SIZE, make_planner
from test_conversation import conversations

from bernini.conversation import Conversation, Media, Message
from bernini.errors import ConfigError, DataError
from bernini.planner.template import IGNORED
from bernini.reasoning import PROPAGATE, by_frame, conclusion, unfold
from datamodules.toyworld import Scene, judge, make_item, make_question, render

KEYS = [("test", 0), ("test", 1)]


@given(conversation=conversations, text=st.text(max_size=9))
def test_a_new_prompt_replaces_the_old_one_and_nothing_else(conversation: Conversation, text: str) -> None:
    changed = conversation.with_prompt(text)
    assert changed.prompt == text
    old = [id(m) for m in conversation.messages if m.media or m.has_loss or m.type == "special_token"]
    new = [id(m) for m in changed.messages]
    assert [m for m in new if m in old] == [m for m in old if m in new]
    assert [id(m) for m in conversation.visual] == [id(m) for m in changed.visual]
    place = next(n for n, m in enumerate(changed.messages) if m.type == "text" and not m.has_loss)
    assert not any(m.has_loss for m in changed.messages[:place])


def test_a_new_prompt_leaves_no_features_of_the_old_one() -> None:
    rows = torch.zeros(2, 3)
    changed = Conversation("t2v", [Message("text", "a")], text_features={"text": rows, "dropped": rows}).with_prompt(
        "b"
    )
    assert set(changed.text_features) == {"dropped"}


@pytest.mark.parametrize(
    ("thought", "prompt"),
    [
        ("the ring is small.\n\nremove the ring\n", "remove the ring"),
        ("a\n\nb\n \nsubject: a ring\nkeep: the rest", "subject: a ring\nkeep: the rest"),
        ("remove the ring", "remove the ring"),
        (" \n", ""),
    ],
)
def test_a_thought_ends_in_a_prompt(thought: str, prompt: str) -> None:
    assert conclusion(thought) == prompt


def test_a_sample_teaches_to_think_and_then_to_draw_what_inference_would() -> None:
    sample = make_item("v2v", 3, edits=["cot"], **SIZE)
    think, draw = unfold(sample)
    template = make_planner().template
    chat, plan = template(think), template(draw)
    thought, explicit = sample.messages[2].text, sample.info["explicit"]

    asked = template.question(sample)  # the instruction alone: neither the thought nor the target is looked at
    answer = template.tokenizer.encode(f"{thought}<|im_end|>")
    assert chat.ids.tolist() == [*asked.ids.tolist(), *answer, *template.tokenizer.encode("\n")]
    assert torch.equal(chat.position_ids[:, : len(asked)], asked.position_ids)
    assert chat.labels[chat.labels != IGNORED].tolist() == answer
    assert chat.target_grid is None and len(chat.visuals) == len(asked.visuals) == 1

    request = template.streams(think.with_prompt(conclusion(thought)))["cond"]
    assert draw.prompt == explicit
    assert torch.equal(plan.ids, request.ids) and torch.equal(plan.position_ids, request.position_ids)
    assert (plan.labels == IGNORED).all() and plan.target_grid == (1, 2, 2)


def test_only_learned_reasoning_beside_a_target_is_unfolded() -> None:
    others = [make_item("v2v", 0, **SIZE), make_question("und_img", 0, **SIZE)]
    given = make_item("v2v", 0, edits=["cot"], **SIZE)
    given.messages[2].has_loss = False
    chat = unfold(make_item("v2v", 0, edits=["cot"], **SIZE))[0]
    assert all(unfold(sample) == [sample] for sample in (*others, given, chat))


def test_losses_of_a_sample_with_reasoning_are_those_of_its_parts() -> None:
    module = make_planner()
    sample = make_item("v2v", 3, edits=["cot"], **SIZE)
    loss, table = module.losses([sample], KEYS[:1], train=False)
    means, parts = table.means(), [module.losses([part], KEYS[:1], train=False) for part in unfold(sample)]
    torch.testing.assert_close(loss, parts[0][0] + parts[1][0])
    assert means.keys() == {"visual", "visual_v2v", "ntp", "accuracy", "thoughts"}
    assert parts[0][1].means().keys() == {"ntp", "accuracy", "thoughts"}
    assert parts[1][1].means().keys() == {"visual", "visual_v2v"}
    for name, value in means.items():
        torch.testing.assert_close(value, next(p.means()[name] for _, p in parts if name in p.means()))


def test_what_is_dropped_of_the_drawing_is_not_dropped_of_the_thinking() -> None:
    module = make_planner()
    module.dropout.text = module.dropout.video = 1.0
    for weight in module.planner.vit_decoder.parameters():  # which starts where no condition matters
        torch.nn.init.normal_(weight, std=0.1)
    sample = make_item("v2v", 3, edits=["cot"], **SIZE)
    kept, dropped = (module.losses([sample], KEYS[:1], train=train)[1].means() for train in (False, True))
    torch.testing.assert_close(dropped["ntp"], kept["ntp"])
    assert dropped["visual"] != kept["visual"]


# -- by a frame ------------------------------------------------------------------------------------------------------


def test_an_edited_frame_leads_the_clip() -> None:
    items = [make_item("v2v", n, edits=["recolour", "remove"], frames=9) for n in range(4)]
    asked: list[Conversation] = []

    def render_truly(requests: list[Conversation]) -> list[torch.Tensor]:
        asked.extend(requests)
        return [render(Scene.from_json(item.info["truth"]["target"]), 1, 64, 64) for item in items]

    led = by_frame(items, render_truly)
    for item, frame, clip in zip(items, asked, led, strict=True):
        assert frame.check(targets=False).task == "i2i" and frame.prompt == item.prompt and frame.key == item.key
        assert torch.equal(frame.sources[0].media.pixels, item.sources[0].media.pixels[:, :1])
        assert frame.targets[0].media is None
        assert clip.check().task == "vi2v" and clip.prompt == PROPAGATE
        assert clip.sources[0].media is item.sources[0].media and clip.targets == item.targets
        assert torch.equal(clip.sources[1].media.pixels, item.targets[0].media.pixels[:, :1])
        assert judge(clip, clip.targets[0].media.pixels)["edit_done"] == 1
    assert PROPAGATE in {make_item("vi2v", 0, **SIZE).prompt}  # what toy models are asked with


def test_frames_keep_the_geometry_of_their_clips() -> None:
    source = {"height": 48.0, "width": 64.0, "frames": 40, "fps": 24.0, "sampled": 9}
    media = Media(pixels=torch.zeros(3, 9, 32, 48, dtype=torch.uint8), fps=16.0, source=source)
    asked: list[Conversation] = []
    request = Conversation("mv2v", [Message("video", media=media), Message("text", "dim the light")])
    (led,) = by_frame([request], lambda requests: [asked.extend(requests) or media.pixels[:, :1]])
    frame = asked[0].sources[0].media
    assert frame.source == {"height": 48, "width": 64, "frames": 1, "fps": 0, "sampled": 1} and frame.fps == 0
    assert led.targets == [] and [m.type for m in led.messages] == ["video", "image", "text"]


@pytest.mark.parametrize("task", ["t2v", "i2i", "rv2v", "ads2v"])
def test_what_has_no_clip_of_its_own_cannot_be_led_by_a_frame(task: str) -> None:
    with pytest.raises(ConfigError, match=f"task {task} cannot be reasoned about with a frame") as caught:
        by_frame([make_item(task, 0, **SIZE)], lambda requests: [])
    assert caught.value.where == f"{task}-000000"


def test_a_clip_without_pixels_is_named() -> None:
    request = Conversation("v2v", [Message("video", media=Media(path="a.mp4"))], key="case-1")
    with pytest.raises(DataError, match="has no frame to edit") as caught:
        by_frame([request], lambda requests: [])
    assert caught.value.where == "case-1"

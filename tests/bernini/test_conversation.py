"""The record that data, planner and renderer share, and its form in the released parquet."""

import json
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bernini.conversation import Batch, Conversation, Media, Message, MessageType
from bernini.errors import ConfigError, DataError
from bernini.tasks import TASKS

VISUAL = ["image", "image_gen", "video", "frame_gen", "video_gen"]
paths = st.text(min_size=1, max_size=20)
options = st.dictionaries(
    st.sampled_from(["duration", "crop_method", "note"]), st.one_of(st.floats(0, 100), st.text(max_size=5)), max_size=2
)


@st.composite
def messages(draw) -> Message:
    kind = draw(st.sampled_from(get_args(MessageType)))
    has_loss = draw(st.sampled_from([None, True, False]))
    if kind not in VISUAL:
        return Message(kind, text=draw(st.text(max_size=20)), has_loss=has_loss)
    media = Media(path=draw(paths), options={} if "image" in kind else draw(options))
    return Message(kind, text=draw(st.none() | st.text(max_size=5)), media=media, has_loss=has_loss)


conversations = st.builds(
    Conversation,
    task=st.sampled_from(sorted(TASKS)),
    messages=st.lists(messages(), max_size=6),
    key=st.text(max_size=5),
)


@given(conversation=conversations)
def test_rows_round_trip(conversation):
    row = json.loads(json.dumps(conversation.to_row()))
    assert Conversation.from_row(row, key=conversation.key) == conversation


@given(conversation=conversations)
def test_every_visual_is_a_source_or_a_target(conversation):
    visual = [m for m in conversation.messages if m.type in VISUAL]
    assert [m for m in visual if m.is_target] == conversation.targets
    assert [m for m in visual if not m.is_target] == conversation.sources
    assert list(conversation.media()) == [m.media for m in visual]


def test_released_rows_are_read():
    row = {
        "source_name": "RV2V$my_clips",
        "inputs": json.dumps(
            [
                {"type": "video", "has_loss": 0},
                {"type": "image", "has_loss": 0},
                {"type": "text", "has_loss": 0, "text": "put the hat of image0 on the dog"},
                {"type": "video_gen", "has_loss": 1},
            ]
        ),
        "images": ["hat.png"],
        "videos": [{"video_path": "dog.mp4", "duration": 5.0, "crop_method": "center"}, {"video_path": "after.mp4"}],
    }
    sample = Conversation.from_row(row, key="000001").check()
    assert sample.task == "rv2v" and sample.key == "000001" and sample.spec.shift == 5
    assert sample.prompt == "put the hat of image0 on the dog"
    assert [m.media.path for m in sample.sources] == ["dog.mp4", "hat.png"]
    assert sample.sources[0].media.options == {"duration": 5.0, "crop_method": "center"}
    assert [m.media.path for m in sample.targets] == ["after.mp4"]
    assert Conversation.from_row(row, task="vrc2v").task == "vrc2v"


def test_rows_may_leave_things_out():
    row = {"task": "i2i", "inputs": [{"type": "image"}, {"type": "image_gen"}], "images": ["a.png", "b.png"]}
    sample = Conversation.from_row(row).check()
    assert [m.has_loss for m in sample.messages] == [False, True]
    row = {"task": "v2v", "inputs": [{"type": "video"}, {"type": "frame_gen"}], "videos": ["a.mp4", "b.mp4"]}
    assert [m.media.path for m in Conversation.from_row(row).check().messages] == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("kind", get_args(MessageType))
def test_loss_falls_on_what_is_generated(kind):
    assert Message(kind).has_loss == kind.endswith("_gen")
    assert Message(kind, has_loss=True).has_loss and not Message(kind, has_loss=False).has_loss


def test_prompt_is_what_the_user_and_the_reasoning_say():
    sample = Conversation(
        "v2v",
        [
            Message("special_token", text="[CLS]"),
            Message("text", text="make it"),
            Message("cot_text", text="the cat is", has_loss=True),
            Message("text", text="blue"),
            Message("text", text="an answer to learn", has_loss=True),
        ],
    )
    assert sample.prompt == "make it the cat is blue"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"inputs": "[]"}, "the row names no task"),
        ({"task": "t2v"}, "not in the released format: KeyError"),
        ({"task": "t2v", "inputs": "[{]"}, "not in the released format: JSONDecodeError"),
        ({"task": "v2v", "inputs": '[{"type": "video"}]', "videos": [[1]]}, "not in the released format: TypeError"),
        ({"task": "t2v", "inputs": "[{}]"}, "not in the released format: KeyError"),
        ({"task": "t2v", "inputs": "[3]"}, "not in the released format: AttributeError"),
        ({"task": "t2v", "inputs": '[{"type": "text", "text": 5}]'}, "a text is 5"),
        ({"task": "v2v", "inputs": '[{"type": "video"}]', "videos": [{}]}, "not in the released format: KeyError"),
        ({"task": "t2v", "inputs": '[{"type": "video_gen"}]', "videos": []}, "more visual messages than media files"),
        ({"task": "t2i", "inputs": '[{"type": "image_gen"}]'}, "more visual messages than media files"),
        ({"task": "t2i", "inputs": '[{"type": "imge"}]'}, "unknown message type 'imge'"),
    ],
)
def test_bad_rows_are_refused_by_name(row, what):
    with pytest.raises(DataError) as caught:
        Conversation.from_row(row, key="shard-3/000007")
    assert what in caught.value.what
    assert caught.value.where == "shard-3/000007"


def visuals(*kinds: str) -> list[Message]:
    return [Message(kind, media=Media(path=kind)) for kind in kinds]


@pytest.mark.parametrize(
    ("task", "kinds"),
    [
        ("t2v", ["video_gen"]),
        ("i2v", ["image", "video_gen"]),
        ("r2v", ["image"] * 7 + ["video_gen"]),
        ("ads2v", ["video", "video", "image", "video_gen"]),
        ("vrc2v", ["video", "video_gen"]),
        ("vr2v", ["video", "image", "frame_gen"]),
    ],
)
def test_samples_that_fit_their_task_pass(task, kinds):
    sample = Conversation(task, visuals(*kinds))
    assert sample.check() is sample


@pytest.mark.parametrize(
    ("task", "kinds", "what"),
    [
        ("t2v", ["image", "video_gen"], "task t2v takes 0 source image(s), the sample has 1"),
        ("v2v", ["video_gen"], "task v2v takes 1 source video(s), the sample has 0"),
        ("r2v", ["video_gen"], "task r2v takes 1 to 64 source image(s), the sample has 0"),
        ("ads2v", ["video", "video_gen"], "task ads2v takes 2 source video(s), the sample has 1"),
        ("v2v", ["video"], "the sample has no target"),
    ],
)
def test_samples_that_do_not_fit_are_refused(task, kinds, what):
    with pytest.raises(DataError) as caught:
        Conversation(task, visuals(*kinds), key="k").check()
    assert caught.value.what == what and caught.value.where == "k" and caught.value.fix


def test_sampling_needs_no_target_and_a_known_task():
    assert Conversation("v2v", visuals("video")).check(targets=False)
    with pytest.raises(ConfigError, match="unknown task 'x9'"):
        Conversation("x9", []).check()


def test_every_tensor_moves_and_the_original_stays():
    media = Media(path="a", pixels=torch.zeros(3, 1, 2, 2), posterior=torch.zeros(8, 1, 1, 1), fps=16.0)
    sample = Conversation(
        "i2i", [Message("text", text="x"), Message("image", media=media)], text_features={"text": torch.zeros(2, 3)}
    )
    batch = Batch([sample], {"epoch": 1})
    moved = batch.to("meta")
    assert len(moved) == 1 and moved.cursor == {"epoch": 1}
    (other,) = moved.samples[0].media()
    tensors = [other.pixels, other.posterior, *moved.samples[0].text_features.values()]
    assert all(x.device.type == "meta" for x in tensors)
    assert replace(other, pixels=None, posterior=None) == Media(path="a", fps=16.0)
    assert media.pixels.device.type == "cpu" and sample.text_features["text"].device.type == "cpu"

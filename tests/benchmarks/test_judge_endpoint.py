"""What a judge behind an endpoint is sent, which models it may be, and how frames are shown."""

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judges import MODEL, make_judge
from servers import chat_server, say

from benchmarks.quality.judging.endpoint import EndpointConfig, EndpointJudge, messages
from benchmarks.quality.judging.question import Prompt, Turn
from benchmarks.quality.judging.showing import Encoding, Seen, Shown, evenly
from bernini.errors import ConfigError, DataError
from bernini.media import read_image, write_image, write_video
from datamodules.toyworld import make_item

PROMPT = Prompt("Rate.", (Turn("user", ("before:", Seen((b"a", b"b"), "image/png", 2.0), "how is it?")),))


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"temperature": 0.0, "seed": 2, "max_tokens": 1024}),
        ({"temperature": None, "seed": None, "max_tokens": 9}, {"max_tokens": 9}),
        ({"effort": "low", "seed": None}, {"reasoning_effort": "low", "max_completion_tokens": 1024}),
    ],
)
def test_what_is_sent(settings: dict[str, Any], options: dict[str, Any]) -> None:
    with chat_server() as server:
        server.replies = [say("4")]
        said = make_judge(server.url, **settings).answer(PROMPT.after("5/5", "a number"), 2, "q1")
    ((_, body),) = server.asked
    assert said.text == "4"
    picture = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}
        for data in (b"a", b"b")
    ]
    assert body == {
        "model": MODEL,
        **options,
        "messages": [
            {"role": "system", "content": "Rate."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "before:"}, *picture, {"type": "text", "text": "how is it?"}],
            },
            {"role": "assistant", "content": "5/5"},
            {"role": "user", "content": "a number"},
        ],
    }


def test_a_rubric_may_be_part_of_the_question() -> None:
    assert messages(Prompt("", (Turn("user", ("a", "b")),))) == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    "model",
    [
        "gpt-4o-2024-11-20",
        "gpt-4.1-2025-04-14",
        "claude-3-5-sonnet-20241022",
        "gemini-2.5-pro-preview-05-06",
        "gpt-4-0613",
        "mistral-large-2411",
    ],
)
def test_dated_models_are_taken(model: str) -> None:
    assert EndpointJudge(EndpointConfig("http://host/v1", model)).name == model


@pytest.mark.parametrize(
    "model", ["gpt-4o", "gpt-4.1", "GPT-5.4", "gemini-2.5-pro", "Qwen/Qwen2.5-VL-72B-Instruct", "o3"]
)
def test_other_models_need_a_revision(model: str) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(model)}' is not pinned") as caught:
        EndpointConfig("http://host/v1", model)
    assert "revision" in caught.value.fix
    assert EndpointJudge(EndpointConfig("http://host/v1", model, revision="cc594898")).name == f"{model}@cc594898"


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"temperature": -1}, {"temperature": 3}, {"url": "host"}, {"workers": 0}]
)
def test_settings_that_cannot_be_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="judge"):
        EndpointConfig(**{"url": "http://host/v1", "model": MODEL, **wrong})


def test_a_key_that_is_not_there_is_named_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="no key in the environment variable NO_SUCH_KEY") as caught:
        make_judge("http://host/v1", key_variable="NO_SUCH_KEY")
    assert caught.value.where == "the judge's key"


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_frames_are_picked_by_number_from_files_and_pixels(tmp_path: Path) -> None:
    clip = make_item("t2v", 0, frames=9, height=48, width=64).targets[0].media.pixels
    write_video(tmp_path / "a.mp4", clip, 16.0, lossless=True)
    for source in (clip, tmp_path / "a.mp4", str(tmp_path / "a.mp4")):
        seen = Shown(source, (8, 0, 3, 3), 4.0).see()
        frames = [read_image(data).pixels for data in seen.frames]
        assert torch.equal(torch.cat(frames, 1), clip[:, [8, 0, 3, 3]]) and (seen.kind, seen.fps) == ("image/png", 4.0)
    write_image(tmp_path / "a.png", clip[:, :1])
    assert Shown(tmp_path / "a.png").see() == Shown(clip).see()
    for source in (clip, tmp_path / "a.mp4", tmp_path / "a.png"):
        with pytest.raises(DataError, match="frame 9 is to be shown"):
            Shown(source, (0, 9)).see()


def test_frames_shrink_and_never_grow_and_their_bytes_are_the_same_each_time() -> None:
    picture = torch.randint(0, 256, (3, 1, 300, 600), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = {512: (256, 512), 600: (300, 600), 9999: (300, 600), None: (300, 600)}
    for edge, size in sizes.items():
        for quality, kind in ((None, "PNG"), (90, "JFIF")):
            encoding = Encoding(edge, quality)
            data = encoding.encode(picture)
            assert kind.encode() in data[:12] and tuple(read_image(data).pixels.shape[2:]) == size
            assert data == encoding.encode(picture.clone())
    lossy, lossless = (read_image(Encoding(None, quality).encode(picture)).pixels for quality in (90, None))
    assert torch.equal(lossless, picture) and 0 < (lossy.float() - picture.float()).abs().mean() < 60


def test_evenly_is_linspace() -> None:
    for frames, count in ((81, 16), (49, 16), (5, 16), (27, 47), (1, 1), (9, 1)):
        assert list(evenly(frames, count)) == np.linspace(0, frames - 1, count, dtype=int).tolist()
    for frames, count in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError):
            evenly(frames, count)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shown("a.mp4", ()),
        lambda: Shown("a.mp4", (-1,)),
        lambda: Shown("a.mp4", fps=-1.0),
        lambda: Encoding(0),
        lambda: Encoding(quality=0),
        lambda: Encoding(quality=96),
    ],
)
def test_what_cannot_be_shown_is_named(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()

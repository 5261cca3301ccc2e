"""The external rewriter against a local server that answers well, badly, late and not at all."""

import base64
import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from planners import SIZE
from servers import Reply, Server, chat_server, say, send

import bernini.cli
from bernini.conversation import Conversation, Media, Message
from bernini.errors import ConfigError, DataError, ServiceError
from bernini.media import read_image
from bernini.rewriting import Rewriter, RewriterConfig, messages
from bernini.tasks import TASKS
from datamodules.toyworld import make_item

KEY = "sk-of-nobody-but-this-test"
EDIT = make_item("rv2v", 0, **SIZE)  # a clip and one image


def late(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.0)


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then, each in time."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    for _ in range(8):
        handler.wfile.write(b" ")
        time.sleep(0.15)


def drop(handler: BaseHTTPRequestHandler) -> None:
    """No answer at all."""


def break_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


@pytest.fixture
def server() -> Iterator[Server]:
    with chat_server() as server:
        yield server


def config_for(server: Server, **more: Any) -> RewriterConfig:
    given = {"url": server.url, "model": "some-model", "timeout": 20.0, "wait": 0.01}
    return RewriterConfig(**{**given, **more})


def rewrite(server: Server, *replies: Reply, request: Conversation = EDIT, **more: Any) -> Conversation:
    server.replies = list(replies)
    (made,) = Rewriter(config_for(server, **more)).rewrite([request])
    return made


# -- what is asked ---------------------------------------------------------------------------------------------------


def test_the_answer_becomes_the_prompt_and_the_rest_stays(server: Server) -> None:
    made = rewrite(server, say("  put the ring of Image0 in the place of the cross\n", finish_reason="stop"))
    assert made.prompt == "put the ring of Image0 in the place of the cross"
    assert (made.task, made.key, made.sources, made.targets) == (EDIT.task, EDIT.key, EDIT.sources, EDIT.targets)
    ((headers, body),) = server.asked
    assert headers["path"] == "/v1/chat/completions" and "Authorization" not in headers
    assert body == {"model": "some-model", "messages": messages(EDIT)}


def test_sources_are_shown_as_pictures() -> None:
    clip = torch.arange(9, dtype=torch.uint8).view(1, 9, 1, 1).expand(3, 9, 600, 1200) * 20
    request = Conversation("rv2v", [Message("video", media=Media(pixels=clip, fps=16.0)), *EDIT.messages[1:]])
    system, user = messages(request)
    assert system["role"] == "system" and "image0" in system["content"]
    texts = [part["text"] for part in user["content"] if part["type"] == "text"]
    assert texts == ["video0, 3 frames from first to last:", "image0:", f"The instruction: {EDIT.prompt}"]
    assert [part["type"] for part in user["content"]] == ["text", *["image_url"] * 3, "text", "image_url", "text"]
    urls = [part["image_url"]["url"].split(",") for part in user["content"] if part["type"] == "image_url"]
    assert {head for head, _ in urls} == {"data:image/png;base64"}
    first, middle, last, image = (read_image(base64.b64decode(data)).pixels for _, data in urls)
    assert [int(frame.unique()) for frame in (first, middle, last)] == [0, 80, 160]
    assert first.shape == (3, 1, 256, 512)
    assert torch.equal(image, EDIT.sources[1].media.pixels)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_its_words_and_names_its_sources(task: str) -> None:
    request = make_item(task, 0, **SIZE)
    system, user = messages(request)
    assert ("references" in system["content"]) == (task in ("r2i", "r2v", "rv2v", "vi2v", "ads2v", "vrc2v"))
    assert ("editing" in system["content"]) == (task in ("i2i", "v2v", "mv2v", "rv2v", "vi2v", "ads2v", "vrc2v"))
    captions = [part["text"].split(":")[0].split(",")[0] for part in user["content"] if part["type"] == "text"]
    kinds = ["image" if m.is_image else "video" for m in request.sources]
    assert captions == [f"{kind}{kinds[:n].count(kind)}" for n, kind in enumerate(kinds)] + ["The instruction"]


def test_many_are_asked_at_once_and_keep_their_order(server: Server) -> None:
    together = threading.Barrier(3, timeout=10)

    def echo(handler: Any) -> None:
        together.wait()  # for as many as are on the way
        say(handler.body["messages"][1]["content"][-1]["text"])(handler)

    requests = [make_item("t2i", n, **SIZE) for n in range(6)]
    server.replies = [echo]
    made = Rewriter(config_for(server, workers=3)).rewrite(requests)
    assert [m.prompt for m in made] == [f"The instruction: {r.prompt}" for r in requests]
    assert [m.key for m in made] == [r.key for r in requests]


def test_the_guide_is_right(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.replies = [say("put the ring of image0 there")]
    names = {"requests": [EDIT]}
    exec(code.replace("http://localhost:8000/v1", server.url), names)
    assert names["requests"][0].prompt == "put the ring of image0 there"
    assert server.asked[0][0]["Authorization"] == f"Bearer {KEY}"


# -- what goes wrong, and mends itself -------------------------------------------------------------------------------

SLOW = {"slow": (late, "no answer in 0.6 s"), "in drops": (drip, "no whole answer in 0.6 s")}
MISHAPS: dict[str, tuple[Reply, str]] = {
    **SLOW,
    "500": (send('{"error": {"message": "out of   memory"}}', 500), "status 500: out of memory"),
    "429": (send("later", 429), "status 429: later"),
    "garbage": (send("<html>"), "not a chat completion"),
    "another form": (send('{"choices": "none"}'), "not a chat completion"),
    "no choices": (send('{"choices": []}'), "not a chat completion"),
    "nothing": (say(" \n"), "the answer is empty"),
    "null": (say(None), "the answer is empty"),
    "cut": (say("put the", finish_reason="length"), "the answer was cut short"),
    "too long": (say("a" * 2001), "2001 characters, at most 2000"),
    "endless": (say("a" * 140_000), "more than 131072 bytes"),
    "invented": (say("the ring of image1"), "speaks of image1, the request has image0, video0"),
    "dropped": (drop, "the connection failed"),
    "broken off": (break_off, "the connection failed"),
}


@pytest.mark.parametrize("name", MISHAPS)
def test_a_mishap_is_asked_about_again(name: str, server: Server) -> None:
    mishap, _ = MISHAPS[name]
    made = rewrite(server, mishap, mishap, say("the ring of image0"), timeout=0.6 if name in SLOW else 20.0)
    assert made.prompt == "the ring of image0"
    assert len(server.asked) == 3


@pytest.mark.parametrize("name", MISHAPS)
def test_mishaps_that_do_not_end_are_one_error(name: str, server: Server) -> None:
    mishap, why = MISHAPS[name]
    with pytest.raises(ServiceError, match="no answer that can be used in 2 attempts") as caught:
        rewrite(server, mishap, retries=1, timeout=0.6 if name in SLOW else 20.0)
    assert why in caught.value.why and len(server.asked) == 2
    assert caught.value.where == f"{EDIT.key}, {server.url}"


def test_waits_grow(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(ServiceError):
        rewrite(server, send("", 503), wait=0.5)
    assert waits == [0.5, 1.0, 2.0]


def test_nobody_at_home_is_one_error(server: Server) -> None:
    url = server.url
    server.server_close()
    with pytest.raises(ServiceError, match="no answer that can be used") as caught:
        Rewriter(RewriterConfig(url, "m", retries=0)).rewrite([EDIT])
    assert "the connection failed (ConnectionError)" in caught.value.why


# -- what does not mend itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "fix"),
    [(401, "check the key"), (403, "check the key"), (404, "url"), (400, "takes images"), (302, "url")],
)
def test_a_refusal_is_not_argued_with(status: int, fix: str, server: Server) -> None:
    elsewhere = send('{"error": {"message": "go away"}}', status, Location="http://127.0.0.1:1/")
    with pytest.raises(ServiceError, match=f"refused with status {status}") as caught:
        rewrite(server, elsewhere)
    assert caught.value.why == "go away" and fix in caught.value.fix and len(server.asked) == 1


def test_the_key_is_sent_and_never_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("PLACE_OF_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)

    def refuse(handler: BaseHTTPRequestHandler) -> None:
        told = handler.headers["Authorization"].removeprefix("Bearer ")
        send(json.dumps({"error": {"message": f"{told} is no key"}}), 401)(handler)

    config = config_for(server, key_variable="PLACE_OF_KEY")
    server.replies = [say("ok"), refuse]
    rewriter = Rewriter(config)
    assert rewriter.rewrite([EDIT])[0].prompt == "ok"
    with pytest.raises(ServiceError) as caught:
        rewriter.rewrite([EDIT])
    assert [headers["Authorization"] for headers, _ in server.asked] == [f"Bearer {KEY}"] * 2
    assert caught.value.why == "*** is no key"
    assert not any(KEY in text for text in (str(caught.value), repr(config), repr(rewriter), caplog.text))


def test_a_failure_ends_a_command_with_its_own_code(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.replies = [send("no", 400)]
    monkeypatch.setattr(bernini.cli, "run", lambda args: Rewriter(config_for(server)).rewrite([EDIT]))
    assert bernini.cli.main(["generate"]) == 69
    assert "refused with status 400" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", " ", "k\u00e9y", "two\nlines"])
def test_a_key_that_is_none_is_refused_before_anything_is_asked(
    key: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE_OF_KEY", key)
    with pytest.raises(ConfigError, match="no key in the environment variable PLACE_OF_KEY"):
        Rewriter(config_for(server, key_variable="PLACE_OF_KEY"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "url cannot be used"),
        ({"url": "ftp://host/v1"}, "url cannot be used"),
        ({"url": f"http://me:{KEY}@host/v1"}, "url cannot be used"),
        ({"url": f"http://host/v1?key={KEY}"}, "url cannot be used"),
        ({"model": ""}, "cannot be asked like that"),
        ({"timeout": 0}, "cannot be asked like that"),
        ({"retries": -1}, "cannot be asked like that"),
        ({"workers": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RewriterConfig(**{"url": "http://host/v1", "model": "m", **settings})
    assert KEY not in str(caught.value)


def test_requests_that_cannot_be_rewritten_are_named(server: Server) -> None:
    rewriter = Rewriter(config_for(server))
    with pytest.raises(DataError, match="no instruction to rewrite") as caught:
        rewriter.rewrite([Conversation("t2v", [], key="case-1")])
    assert caught.value.where == "case-1"
    unseen = Conversation("v2v", [Message("video", media=Media(path="a.mp4")), Message("text", "x")], key="case-2")
    with pytest.raises(DataError, match="video0 has no pixels") as caught:
        rewriter.rewrite([unseen])
    assert caught.value.where == "case-2" and not server.asked

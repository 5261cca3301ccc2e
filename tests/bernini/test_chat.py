"""What the chat client does beside what its users' tests show: waits that a server asks for, and facts of an answer."""

import time
from collections.abc import Iterator
from email.utils import formatdate

import pytest
from servers import Server, chat_server, send

from bernini.chat import LONGEST_WAIT, Chat, ChatConfig, Completion, UnwelcomeError, Useless
from bernini.errors import ServiceError


class Jittery(ChatConfig):
    jitter = 0.5


@pytest.fixture
def server() -> Iterator[Server]:
    with chat_server() as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def as_is(completion: Completion) -> Completion:
    return completion


@pytest.mark.parametrize(
    ("told", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0.5, 0.5),
        ("1e9", LONGEST_WAIT, LONGEST_WAIT),
        ("nan", 0.5, 0.5),
        ("soon", 0.5, 0.5),
        pytest.param(formatdate(time.time() + 3600, usegmt=True), LONGEST_WAIT, LONGEST_WAIT, id="in an hour"),
        (formatdate(0, usegmt=True), 0.5, 0.5),
    ],
)
def test_a_server_says_how_long_to_wait(
    told: str, least: float, most: float, server: Server, waits: list[float]
) -> None:
    server.replies = [send("", 429, **{"Retry-After": told}), send('{"choices": [{"message": {"content": "ok"}}]}')]
    assert Chat(ChatConfig(server.url, "m", wait=0.5)).ask({}, as_is).text == "ok"
    assert len(waits) == 1 and least <= waits[0] <= most


def test_waits_differ_where_they_are_to(server: Server, waits: list[float]) -> None:
    server.replies = [send("", 503)]
    chat = Chat(Jittery(server.url, "m", wait=1.0, retries=20, timeout=20.0))
    with pytest.raises(ServiceError):
        chat.ask({}, as_is)
    shares = [wait / min(2**n, LONGEST_WAIT) for n, wait in enumerate(waits) if 1.5 * 2**n < LONGEST_WAIT]
    assert len(set(shares)) == len(shares) > 4 and all(1 <= share <= 1.5 for share in shares)
    assert max(waits) == LONGEST_WAIT and len(server.asked) == 21


def test_an_answer_comes_with_its_facts(server: Server) -> None:
    server.replies = [
        send(
            '{"model": "m-1", "system_fingerprint": "fp_9", "usage": {"total_tokens": 7},'
            ' "choices": [{"message": {"content": " 4 "}, "finish_reason": "length"}]}'
        )
    ]
    said = Chat(ChatConfig(server.url, "m")).ask({"messages": [], "seed": 3}, as_is)
    assert (said.text, said.finish, said.model, said.fingerprint) == (" 4 ", "length", "m-1", "fp_9")
    assert said.is_cut and said.usage == {"total_tokens": 7} and said.seconds > 0
    assert server.asked[0][1] == {"model": "m", "messages": [], "seed": 3}
    server.replies = [send('{"choices": [{"message": {"content": null}}], "usage": 3, "model": null}')]
    bare = Chat(ChatConfig(server.url, "m")).ask({}, as_is)
    assert (bare.text, bare.model, bare.usage, bare.is_cut) == ("", "", {}, False)


@pytest.mark.parametrize(("status", "all_meet_it"), [(400, False), (401, True), (403, True), (404, True), (302, False)])
def test_refusals_that_all_would_meet_are_told_apart(status: int, all_meet_it: bool, server: Server) -> None:
    server.replies = [send("no", status)]
    with pytest.raises(ServiceError) as caught:
        Chat(ChatConfig(server.url, "m")).ask({}, as_is)
    assert isinstance(caught.value, UnwelcomeError) == all_meet_it and len(server.asked) == 1
    assert "{who}" not in caught.value.fix


def test_what_the_caller_cannot_use_is_asked_again(server: Server, waits: list[float]) -> None:
    def accept(completion: Completion) -> str:
        if len(server.asked) < 3:
            raise Useless("not yet")
        return completion.text

    assert Chat(ChatConfig(server.url, "m")).ask({}, accept) == "ok" and len(server.asked) == 3

"""A judged run that is killed: what the judge has answered is not asked for again, and the summary is the same."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from random import Random

import pytest
from judges import MODEL
from official_files import WRITERS
from servers import Server, chat_server, say

from benchmarks.quality.folder import digest
from bernini.cli import main

TOY = Path(__file__).parents[2] / "assets" / "toy"
SMALL = ["--model", str(TOY), "--steps", "1", "--text-rows", "48", "--mode", "v2v", "--omega", "txt=1,scale=1"]
SMALL += ["--device", "cpu", "--max-edge", "64", "--min-edge", "32", "--types", "camera_edit", "--frames", "5"]
QUESTIONS, WORKERS = 54, 4
SPAWNED = multiprocessing.get_context("forkserver")
SPAWNED.set_forkserver_preload(["benchmarks.bench"])


class Landings:
    """A judge that tells when an answer has left it whole, and after so many sends no more."""

    def __init__(self, server: Server) -> None:
        self.asked: list[str] = []
        self.landed: list[str] = []
        self.left = self.sending = QUESTIONS
        self.turn, self.open = threading.Lock(), threading.Event()
        server.replies = [self]

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        place = digest(handler.body)
        with self.turn:
            self.asked.append(place)
            self.left -= 1
            held = self.left < 0
        if held:
            self.open.wait(60)  # until its client is dead
            return
        time.sleep(0.002 * (int(place[:2], 16) % 5))
        scores = [1 + int(place[2 * n : 2 * n + 2], 16) % 5 for n in range(3)]
        labels = ("Instruction compliance", "Consistency", "Visual quality")
        text = "\n".join(f"{label}: {score}" for label, score in zip(labels, scores, strict=True))
        say(text, finish_reason="stop")(handler)
        with self.turn:
            self.landed.append(place)

    def allow(self, answers: int) -> int:
        """Send so many answers more; gives how many there then will be."""
        self.open.set()
        self.open = threading.Event()
        with self.turn:
            self.left = answers
            return len(self.landed) + answers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs that are not yet judged."""
    root = tmp_path_factory.mktemp("run")
    WRITERS["openve"](root / "data")
    place = ["--root", str(root / "data"), "--accept-licence", "--out", str(root / "made")]
    assert main(["bench", "generate", "openve", *place, *SMALL]) == 0
    return root / "made"


@pytest.fixture
def server() -> Iterator[Server]:
    with chat_server() as server:
        yield server


def copied(made: Path, to: Path) -> Path:
    """A run of its own over the same outputs."""
    to.mkdir()
    for file in ("manifest.json", "gen.jsonl", "videos"):
        (to / file).symlink_to(made / file)
    return to


def judge(out: Path, url: str) -> None:
    """`bernini bench score`, which a process of its own can run, too."""
    assert main(["bench", "score", str(out), "--judge-url", url, "--judge-model", MODEL]) == 0


def kept(out: Path) -> int:
    """Answers on the disk, as whole lines."""
    file = out / "judge" / "answers.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def finished(out: Path, server: Server) -> dict[str, bytes]:
    """Judge what is left, and give what came of it all."""
    judge(out, server.url)
    assert main(["bench", "aggregate", str(out), "--examples", "0"]) == 0
    names = ("summary.json", "table.md", "table.csv")
    scores = {path.name: json.dumps(sorted(path.read_text().splitlines())).encode() for path in out.glob("scores/*")}
    return {**{name: (out / name).read_bytes() for name in names}, **scores}


def test_what_the_judge_has_answered_is_not_asked_for_again(
    made: Path, server: Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Killed after any number of answers, while others are on the way."""
    kills, draw = request.config.getoption("--kills"), Random(0)
    landings = Landings(server)
    expected = finished(copied(made, tmp_path / "whole"), server)
    assert len(landings.asked) == len(set(landings.asked)) == QUESTIONS
    landings, out = Landings(server), copied(made, tmp_path / "killed")
    stops = sorted(draw.sample(range(1, QUESTIONS - WORKERS), kills))
    for stop in stops:
        there = landings.allow(stop - len(landings.landed))
        process = SPAWNED.Process(target=judge, args=(out, server.url))
        process.start()
        until = time.monotonic() + 60
        while kept(out) < there:  # an answer that has landed is on the disk, whatever else goes on
            assert process.is_alive() and time.monotonic() < until
            time.sleep(draw.random() / 200)
        time.sleep(draw.random() / 50)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert kept(out) == len(landings.landed) == stop
    landings.allow(QUESTIONS)
    assert finished(out, server) == expected
    assert len(set(landings.landed)) == len(landings.landed) == QUESTIONS, "each answer was given once"
    assert len(set(landings.asked)) == QUESTIONS
    assert len(landings.asked) - QUESTIONS <= kills * WORKERS, "asked again is what was on the way"


def test_a_kill_at_any_time_loses_what_was_on_the_way_and_nothing_else(
    made: Path, server: Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Killed while answers are read, written and synchronised: whatever the file holds as a line is not asked again."""
    kills, draw = request.config.getoption("--kills"), Random(1)
    Landings(server)
    expected = finished(copied(made, tmp_path / "whole"), server)
    landings, out = Landings(server), copied(made, tmp_path / "killed")
    landings.allow(10 * QUESTIONS)
    for _ in range(kills):
        before, there = len(landings.asked), kept(out)
        process = SPAWNED.Process(target=judge, args=(out, server.url))
        process.start()
        wanted, until = there + draw.randint(1, max(1, (QUESTIONS - there) // 3)), time.monotonic() + 60
        while kept(out) < min(wanted, QUESTIONS) and process.is_alive():
            assert time.monotonic() < until
            time.sleep(draw.random() / 1000)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        time.sleep(0.05)  # what was on the way arrives at the judge
        assert len(landings.asked) - before <= QUESTIONS - there, "nothing that was there is asked for"
    assert finished(out, server) == expected
    assert len(set(landings.asked)) == QUESTIONS and len(landings.asked) - QUESTIONS <= kills * WORKERS

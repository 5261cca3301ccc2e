"""Whole runs of `bernini bench`, killed anywhere or divided among processes, end as if nothing had happened."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from http.server import BaseHTTPRequestHandler
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from official_files import WRITERS
from servers import Server, chat_server, say

from benchmarks.quality.folder import Journal, RunFolder, Shard, digest
from bernini.cli import main

TOY = Path(__file__).parents[2] / "assets" / "toy"
MODEL = ["--model", str(TOY), "--steps", "1", "--text-rows", "48", "--mode", "v2v", "--omega", "txt=1,scale=1"]
MODEL += ["--device", "cpu", "--batch-size", "1"]
EDITS = ["--accept-licence", "--max-edge", "64", "--min-edge", "32"]
RUNS = {
    "vbench2": ["--dimensions", "complex_landscape", "--frames", "5", "--height", "32", "--width", "32"],  # of texts
    "gedit": EDITS[1:],  # judged
    "ivebench": [*EDITS, "--frames", "5", "--bounds"],  # edits beside their sources
}
RESULT = ("summary.json", "table.md", "table.csv")


def rate(handler: BaseHTTPRequestHandler) -> None:
    """Scores that follow from what is asked."""
    number = int(digest(handler.body)[:6], 16)  # type: ignore[attr-defined]
    say(json.dumps({"score": [number % 11, number // 11 % 11]}), finish_reason="stop")(handler)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with chat_server() as server:
        server.replies = [rate]
        yield server


@pytest.fixture(scope="module")
def words(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The command line of a run, but for its folder."""
    root = tmp_path_factory.mktemp("data")
    for name in RUNS:
        WRITERS[name](root / name)
    judge = {"gedit": ["--judge-url", server.url, "--judge-model", "judge-2026-01-31"]}

    def line(name: str, verb: str = "run") -> list[str]:
        more = [*judge.get(name, []), "--examples", "2"] if verb == "run" else []
        return ["bench", verb, name, "--root", str(root / name), *MODEL, *RUNS[name], *more]

    return line


@pytest.fixture(scope="module")
def whole(words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run in one go, and beside it the seconds that it took."""
    root = tmp_path_factory.mktemp("whole")
    assert finish(start(["bench", "check"])) == 0  # starts the server of processes, which takes longer than a run

    @cache
    def made(name: str) -> Path:
        began = time.monotonic()
        assert finish(start([*words(name), "--out", str(root / name)])) == 0
        (root / f"{name}.seconds").write_text(str(time.monotonic() - began))
        return root / name

    return made


def start(words: list[str]) -> BaseProcess:
    """The command in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.bench", "lightning", "av", "peft", "torchvision"])
    process = context.Process(target=_run, args=(words,))
    process.start()
    return process


def _run(words: list[str]) -> None:
    torch.set_num_threads(1)  # how many share a product decides its rounding
    os.environ["NO_PROXY"] = "127.0.0.1"
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        raise SystemExit(main(words))


def finish(process: BaseProcess) -> int | None:
    process.join(300)
    return process.exitcode


def outputs(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.suffix in (".mp4", ".png") and "examples" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if not path.name.startswith(".")}


def records(folder: Path) -> dict[str, Any]:
    """What is told of each item, whoever told it, in whatever order."""
    journals = {path.name.split(".")[0]: path.parent for path in folder.rglob("*.jsonl") if "judge" not in path.parts}
    rows = {
        name: Journal(parent / f"{name}.jsonl", Shard()).rows() for name, parent in journals.items() if name != "items"
    }
    return {name: dict(sorted(own.items())) for name, own in rows.items()}


def same(folder: Path, expected: Path) -> None:
    for file in RESULT:
        assert (folder / file).read_bytes() == (expected / file).read_bytes()
    assert outputs(folder) == outputs(expected) and records(folder) == records(expected)


@pytest.mark.parametrize("name", RUNS)
def test_one_command_is_a_whole_run(name: str, whole: Callable[[str], Path]) -> None:
    found = json.loads((whole(name) / "summary.json").read_text())
    assert found["items"] == found["of"] == {"vbench2": 90, "gedit": 11, "ivebench": 4}[name]
    assert found["coverage"] == 1 and found["failures"] == [] and found["comparable"] == (name == "gedit")
    assert (whole(name) / "report.html").is_file()


@pytest.mark.parametrize("name", RUNS)
def test_killed_anywhere_a_run_goes_on(
    name: str,
    words: Callable[..., list[str]],
    whole: Callable[[str], Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    expected, draw, left = whole(name), Random(0), -(-request.config.getoption("--kills") // 2)
    seconds = float(expected.with_name(f"{name}.seconds").read_text())
    while left:  # a run that is done too soon is none that was killed
        out = tmp_path / f"run-{draw.random()}"
        process = start(line := [*words(name), "--out", str(out)])
        time.sleep(draw.random() * seconds)
        process.kill()
        if finish(process) == -signal.SIGKILL:
            there = sorted(path.name for path in out.glob("*"))
            print(f"{name} was killed when there were {len(outputs(out))} outputs and {' '.join(there)}")
            left -= 1
            assert finish(start(line)) == 0
        same(out, expected)


@pytest.mark.parametrize(
    ("name", "ranks"), [("vbench2", 3), ("gedit", 2), ("gedit", 3), ("ivebench", 2), ("ivebench", 3)]
)
def test_several_processes_make_the_same_to_the_bit(
    name: str, ranks: int, words: Callable[..., list[str]], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "run")]
    parts = [start([*words(name), *out, "--shard", f"{rank}/{ranks}"]) for rank in range(ranks)]  # side by side
    assert [finish(part) for part in parts] == [0] * ranks
    assert main(["bench", "aggregate", str(tmp_path / "run"), "--examples", "0"]) == 0
    same(tmp_path / "run", whole(name))
    assert RunFolder(tmp_path / "run").manifest()["run"] == RunFolder(whole(name)).manifest()["run"]

"""`bernini prepare` at scale: the same bytes whoever makes the shards, and however often it is broken off."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from factories import EDGE, FRAMES, make_clip

from bernini.cli import main
from bernini.errors import ConfigError
from bernini.media import write_video
from datamodules import progress
from datamodules.index import INDEX
from datamodules.prepare import BAD_SAMPLES, TEXT_FEATURES, prepare
from datamodules.scanning import index_folder
from datamodules.shards import Shards

COUNT, IN_SHARD = 9, 2


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of nine edits, of which number 4 has no target."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for number in range(COUNT):
        for name, seed in (("src", number), ("tgt", number + 1000)):
            pixels = make_clip(seed, FRAMES + 4 * (number % 2), EDGE, EDGE + 16 * (number % 3)).pixels
            assert pixels is not None
            write_video(folder / f"{number}.{name}.mp4", pixels, 16)
        rows.append({"task": "v2v", "prompt": "make it red", "videos": [f"{number}.src.mp4"]})
        if number != 4:
            rows[-1]["target"] = f"{number}.tgt.mp4"
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "list.jsonl"


@pytest.fixture(scope="module")
def options(clips: Path, wan: Path) -> list[str]:
    imported = ["factories", "datamodules.prepare", "bernini.vae.codec", "bernini.text.encoder"]
    multiprocessing.set_forkserver_preload(imported)  # once for all processes
    shard = ["--samples-per-shard", str(IN_SHARD)]
    return ["prepare", str(clips), "--vae", str(wan), "--text", str(wan), "--skip-bad", *shard]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def expected(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an unbroken run of one process writes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    assert main([*options, str(out)]) == 0
    return contents(out)


def test_what_a_run_writes(expected: dict[str, bytes], tmp_path: Path) -> None:
    shards = {f"shard-{number:06d}.tar" for number in range(-(-COUNT // IN_SHARD))}
    assert expected.keys() == shards | {"index.jsonl", BAD_SAMPLES, TEXT_FEATURES}
    (bad,) = map(json.loads, expected[BAD_SAMPLES].splitlines())
    assert bad["key"] == "00000005" and "no target" in bad["what"]
    for name in shards:
        (tmp_path / name).write_bytes(expected[name])
    index = index_folder(tmp_path)
    assert (tmp_path / INDEX).read_bytes() == expected[INDEX], "as `bernini data index` makes it of the shards"
    assert all(shown.prepared for shard in index.shards for entry in shard.entries for shown in entry.shown)


def test_processes_make_the_same_bytes(options: list[str], expected: dict[str, bytes], tmp_path: Path) -> None:
    assert main([*options, str(tmp_path / "out"), "--workers", "2", "--devices", "[cpu,cpu]"]) == 0
    assert contents(tmp_path / "out") == expected


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray with two processors of this machine."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_ray_makes_the_same_bytes(
    clips: Path, wan: Path, options: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    """By the command of the guide, with less of everything."""
    from test_data_guide import RAY  # not above: processes that are started import this file

    places = {"/shared/clips": str(clips), "/shared/shards": str(tmp_path / "out"), "64": "2"}
    words = [places.get(word, str(wan) if "models" in word else word) for word in RAY]
    assert options[:4] == [words[0], words[1], *words[3:5]]
    assert main([*words, *options[4:]]) == 0
    assert contents(tmp_path / "out") == expected


@pytest.mark.usefixtures("cluster")
def test_ray_tells_errors_as_they_are(clips: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["prepare", str(clips), str(tmp_path / "out"), "--ray"]) == 77
    error = capsys.readouterr().err
    assert "bernini: error: the sample has no target" in error and "line 5" in error and "Traceback" not in error


# -- broken off -------------------------------------------------------------------------------------------------------


def start(args: list[str]) -> BaseProcess:
    """The command in a process of its own."""
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(args,))
    process.start()
    return process


def _run(args: list[str]) -> None:
    with Path(args[-1] + ".log").open("w") as log, redirect_stderr(log):
        raise SystemExit(main(args))


def wait_for(something: Any, seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := something()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
    return found


def children(pid: int | None) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_anywhere_a_run_goes_on(
    options: list[str], expected: dict[str, bytes], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def begin(out: Path) -> BaseProcess:
        process = start([*options, str(out)])
        wait_for((out / ".prepare.json").exists)
        return process

    process = begin(tmp_path / "timed")
    began = time.monotonic()
    process.join()
    whole = time.monotonic() - began
    draw, left = random.Random(0), request.config.getoption("--kills")
    while left:  # a run that is done too soon is none that was killed
        out = tmp_path / f"out{draw.random()}"
        process = begin(out)
        time.sleep(draw.random() * whole)
        process.kill()
        process.join()
        there = sorted(path.name for path in out.rglob("*"))
        if process.exitcode == -signal.SIGKILL:
            print(f"killed when there was {' '.join(there)}")
            left -= 1
            assert main([*options, str(out)]) == 0
        assert contents(out) == expected


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes where Linux lists them")
def test_workers_end_with_a_run_that_is_killed(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["prepare", str(clips), "--skip-bad", "--samples-per-shard", "1", "--workers", "1", str(out)]
    broken = start(options)
    os.kill(wait_for(lambda: workers_of(broken.pid))[0], signal.SIGKILL)
    broken.join()
    assert broken.exitcode == 1 and "a worker process died" in (tmp_path / "out.log").read_text()
    process = start(options)
    left = wait_for(lambda: workers_of(process.pid))
    wait_for(lambda: list(out.glob(".prepare/shard-*.json")))
    process.kill()
    process.join()
    wait_for(lambda: not any(map(running, left)), 10)
    assert process.exitcode == -signal.SIGKILL
    assert main(options) == 0 and len(Shards(out)) == COUNT - 1


def workers_of(pid: int | None) -> list[int]:
    """Processes that the server of a run has forked."""
    servers = [child for child in children(pid) if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return [worker for server in servers for worker in children(server)]


def test_what_is_made_is_not_made_again(clips: Path, wan: Path, tmp_path: Path, capsys: Any) -> None:
    out, args = tmp_path / "out", ["prepare", str(clips), str(tmp_path / "out"), "--samples-per-shard", "2"]
    assert main(args) == 77  # the sample without a target, in the third shard
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(made) == 2 and not (out / "index.jsonl").exists()
    assert main([*args, "--max-edge", "16"]) == 78
    error = capsys.readouterr().err
    assert "shards of another run" in error and "it differs in max_edge" in error
    assert main([*args, "--skip-bad", "--limits.timeout", "50"]) == 0, "limits change no sample that is there"
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert len(Shards(out)) == COUNT - 1
    assert main([*args, "--skip-bad"]) == 78
    assert "already holds shards" in capsys.readouterr().err


def test_a_run_killed_while_it_tidies_up(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(progress.shutil, "rmtree", interrupt)
        prepare(str(clips), str(out), skip_bad=True)
    shutil.rmtree(out / ".prepare")  # it came so far
    before = contents(out)
    with pytest.raises(ConfigError, match="shards of another run"):
        prepare(str(clips), str(out), skip_bad=True, max_frames=1)
    assert len(prepare(str(clips), str(out), skip_bad=True)) == COUNT - 1
    assert contents(out) == {name: data for name, data in before.items() if name != ".prepare.json"}


def test_keys_that_come_twice_are_found_before_anything_is_made(clips: Path, tmp_path: Path, capsys: Any) -> None:
    row = {"key": "one", "task": "v2v", "prompt": "x", "videos": ["0.src.mp4"], "target": "0.tgt.mp4"}
    twice = clips.parent / "twice.jsonl"
    twice.write_text(f"{json.dumps(row)}\n{json.dumps({**row, 'key': 'two'})}\n{json.dumps(row)}\n")
    assert main(["prepare", str(twice), str(tmp_path / "out"), "--samples-per-shard", "1"]) == 77
    error = capsys.readouterr().err
    assert "the key 'one' comes twice" in error and "line 3" in error and "line 1" in error
    assert not (tmp_path / "out").exists()


def test_devices_and_sizes_that_are_none(clips: Path, tmp_path: Path, capsys: Any) -> None:
    args = ["prepare", str(clips), str(tmp_path / "out")]
    assert main([*args, "--devices", "[gpu]"]) == 78
    assert "there is no device 'gpu'" in capsys.readouterr().err
    assert main([*args, "--samples-per-shard", "0"]) == 78
    assert "samples_per_shard is 0" in capsys.readouterr().err
    assert main([*args, "--workers", "-1"]) == 78
    assert "workers is -1" in capsys.readouterr().err
    assert main([*args, "--devices", "[cpu]", "--ray"]) == 78
    assert "leave --devices away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "package", "extra"), [("--ray", "ray", "ray"), ("--from-parquet", "pyarrow", "parquet")]
)
def test_packages_that_are_not_installed(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, option: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["prepare", option, str(clips), str(tmp_path / "out")]) == 78
    assert f"pip install 'bernini[{extra}]'" in capsys.readouterr().err

"""`bernini generate`, run as a user does, over the toy family."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planners import write_planner_folder
from torch import Tensor

from bernini.cli import main
from bernini.errors import CheckpointError, ConfigError, DataError
from bernini.media import probe_video, read_image, read_video, resize, write_image, write_video
from bernini.tasks import TASKS
from datamodules.toyworld import make_item

TOY = str(Path(__file__).parents[2] / "assets" / "toy")
FAST = ["--steps", "2"]
PLANNED = ["--planning-steps", "2", "--planning-flow-steps", "1", "--mode", "vae_txt_vit_wapg"]
CONFIG, DATA, WEIGHTS = ConfigError.exit_code, DataError.exit_code, CheckpointError.exit_code


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random planner for the toy family's renderer."""
    return str(write_planner_folder(tmp_path_factory.mktemp("planner"), gen_dim=64))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 14 frames at 32 fps, which is 7 frames at 16, another of 2, and an image; none is 64 pixels wide."""
    folder = tmp_path_factory.mktemp("media")
    item = make_item("rv2v", 0, frames=17, height=64, width=64)
    clip, image = (message.media.pixels for message in item.sources[:2])
    write_video(folder / "clip.mp4", resize(clip[:, :14], 70, 140), 32.0)
    write_video(folder / "short.mp4", clip[:, :4], 32.0)
    write_image(folder / "image.png", resize(image, 96, 96))
    return folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which has to end with a code; gives what it says."""

    def generate(*arguments: Any, code: int = 0) -> str:
        capfd.readouterr()
        assert main(["generate", "--model", TOY, *map(str, arguments)]) == code
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return said.err if code else said.out

    return generate


def all_tasks(media: Path) -> list[dict[str, Any]]:
    """A case of each task."""
    cases = []
    for name, task in TASKS.items():
        videos = [["clip.mp4"], ["clip.mp4", "short.mp4"]][task.videos[0] - 1] if task.videos[0] else []
        images = ["image.png"] * max(task.images[0], name in ("r2v", "ads2v"))
        files = {"videos": [str(media / v) for v in videos], "images": [str(media / i) for i in images]}
        cases.append({"name": name, "task": name, "prompt": "a red square moves right", **files})
    return cases


def write(path: Path, cases: Any) -> Path:
    path.write_text(json.dumps(cases))
    return path


def made(path: Path) -> Tensor:
    media = read_image(path) if path.suffix == ".png" else read_video(path)
    assert media.pixels is not None
    return media.pixels[:, : int(media.source["sampled"])]


@pytest.mark.parametrize("planned", [False, True], ids=["renderer", "full"])
def test_every_task(run: Callable[..., str], media: Path, planner: str, tmp_path: Path, planned: bool) -> None:
    cases = write(tmp_path / "cases.json", all_tasks(media))
    more = ["--planner", planner, *PLANNED] if planned else []
    said = run("--cases", cases, "--out", tmp_path / "out", "--batch-size", 12, *FAST, *more)
    outputs = sorted(path for path in (tmp_path / "out").iterdir() if path.suffix != ".json")
    assert said.split() == [str(tmp_path / "out" / f"{name}{suffix(name)}") for name in TASKS]
    assert [path.name for path in outputs] == sorted(f"{name}{suffix(name)}" for name in TASKS)
    for path in outputs:
        task, told = TASKS[path.stem], json.loads(path.with_suffix(".json").read_text())
        square = not task.videos[0]
        frames = 1 if task.target == "image" else 9 if square else 7
        height = 64 if square else 32
        assert made(path).shape == (3, frames, height, 64)
        if task.target == "video":
            assert probe_video(path) == {"height": height, "width": 64, "frames": frames, "fps": 16.0}
        assert (told["task"], told["prompt"], told["made_together"]) == (path.stem, "a red square moves right", 12)
        assert (told["frames"], told["height"], told["width"], told["settings"]["seed"]) == (frames, height, 64, 42)
        assert told["settings"]["mode"] == ("vae_txt_vit_wapg" if planned else "v2v")
        assert told["settings"]["steps"] == 2 and told["seconds"] > 0
        assert told["planner"] == (planner if planned else None)


def suffix(task: str) -> str:
    return ".png" if TASKS[task].target == "image" else ".mp4"


def test_same_seed_same_bytes_and_existing_outputs_stay(run: Callable[..., str], media: Path, tmp_path: Path) -> None:
    ask = ["--task", "v2v", "--prompt", "make it red", "--video", media / "clip.mp4", *FAST]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(*ask, "--out", tmp_path / f"{name}.mp4", "--seed", seed)
    first, second, other = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert first == second != other
    (tmp_path / "a.mp4").write_bytes(b"kept")
    assert "a.mp4 exists" in run(*ask, "--out", tmp_path / "a.mp4", "--seed", 1)
    assert (tmp_path / "a.mp4").read_bytes() == b"kept"
    run(*ask, "--out", tmp_path / "a.mp4", "--seed", 1, "--overwrite")
    assert (tmp_path / "a.mp4").read_bytes() == first


def test_cases_have_their_own_settings_whatever_the_batches_and_ranks(
    run: Callable[..., str], media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image.png").write_bytes((media / "image.png").read_bytes())  # files are relative to the list
    edit = {"task": "i2i", "prompt": "make it blue", "images": ["image.png"]}
    rows = [
        {"name": "a", **edit},
        {"name": "b", "task": "t2i", "prompt": "a red ring", "seed": 7, "width": 32},
        {"name": "c", **edit, "seed": 7},
        {"name": "d", **edit, "steps": 3},
        {"name": "e", "task": "t2i", "prompt": "a red ring", "mode": "t2v_apg", "height": 32, "width": 32},
    ]
    cases = write(tmp_path / "cases.json", rows)
    run("--cases", cases, "--out", tmp_path / "together", "--batch-size", 5, *FAST)
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        said = run("--cases", cases, "--out", tmp_path / "shared", *FAST)
        assert sorted(Path(line).stem for line in said.split()) == [["a", "c", "e"], ["b", "d"]][rank]
    told = {}
    for row in rows:
        name = row["name"]
        one, two = (tmp_path / folder / f"{name}.png" for folder in ("together", "shared"))
        assert (made(one).int() - made(two).int()).abs().max() <= 1
        told[name] = json.loads(one.with_suffix(".json").read_text())
    settings = {name: one["settings"] for name, one in told.items()}
    assert [settings[name]["seed"] for name in "abcde"] == [42, 7, 7, 42, 42]
    assert [settings[name]["steps"] for name in "abcde"] == [2, 2, 2, 3, 2]
    assert [settings[name]["mode"] for name in "abcde"] == ["v2v"] * 4 + ["t2v_apg"]
    assert (told["b"]["height"], told["b"]["width"]) == (64, 32)
    assert told["a"]["made_together"] == 2  # a and c differ in the seed alone
    assert not torch.equal(made(tmp_path / "together" / "a.png"), made(tmp_path / "together" / "c.png"))


def test_a_plan_is_kept_and_rendered_again(run: Callable[..., str], media: Path, planner: str, tmp_path: Path) -> None:
    ask = ["--planner", planner, "--task", "v2v", "--prompt", "make it red", "--video", media / "clip.mp4"]
    ask += [*FAST, *PLANNED]
    run(*ask, "--out", tmp_path / "a.mp4", "--save-plan")
    plan = tmp_path / "a.plan.safetensors"
    run(*ask, "--out", tmp_path / "b.mp4", "--plan", plan)
    run(*ask, "--out", tmp_path / "c.mp4", "--no-plan", "--mode", "v2v_apg")
    first, again, without = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert first == again != without
    assert json.loads((tmp_path / "b.json").read_text())["plan"] == str(plan)
    other = ["--planner", planner, "--task", "t2v", "--prompt", "red", *FAST, *PLANNED, "--plan", plan]
    said = run(*other, "--out", tmp_path / "d.mp4", "--width", 128, "--height", 32, "--max-edge", 128, code=DATA)
    assert "the plan is for another target: its grid is 2 x 2 x 4, here 2 x 2 x 8 is wanted" in said
    plan.write_bytes(plan.read_bytes()[:100])
    assert "the plan cannot be read" in run(*ask, "--out", tmp_path / "e.mp4", "--plan", plan, code=DATA)


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["--task", "v2w", "--prompt", "x"], CONFIG, "unknown task 'v2w'"),
        (["--prompt", "x"], CONFIG, "nothing to make"),
        (["--task", "v2v", "--prompt", "x"], DATA, "task v2v takes 1 source video(s), the sample has 0"),
        (["--task", "v2v", "--prompt", "x", "--video", "nowhere.mp4"], DATA, "nowhere.mp4"),
        (["--task", "v2v", "--prompt", "x", "--video", "{media}/image.png"], DATA, "cannot be decoded"),
        (["--task", "v2v", "--prompt", "x", "--video", "{media}/clip.mp4", "--mode", "v2v_agp"], CONFIG, "'v2v_apg'?"),
        (["--task", "t2v", "--prompt", "x", "--mode", "vae_txt_vit"], CONFIG, "needs a plan"),
        (["--task", "t2v", "--prompt", "x", "--preset", "v2"], CONFIG, "is for models with a planner"),
        (["--task", "t2v", "--prompt", "x", "--frames", "10"], CONFIG, "frames is 10"),
        (["--task", "t2i", "--prompt", "x"], DATA, "cannot hold what t2i makes"),
        (["--task", "t2v", "--prompt", "x", "--plan", "{media}/clip.mp4"], CONFIG, "a plan without a planner"),
        (["--task", "t2v", "--prompt", "x", "--planner", "{media}"], WEIGHTS, "the planner cannot be read"),
        (["--task", "t2v", "--prompt", "x", "--model", "{media}/nowhere"], WEIGHTS, "no such folder"),
        (["--task", "t2v", "--prompt", "x", "--offload", "--device", "cpu"], CONFIG, "nowhere to move weights"),
        (["--task", "t2v", "--cases", "x.json"], CONFIG, "--task beside --cases"),
        (["--cases", "nowhere.json"], DATA, "the cases cannot be read"),
    ],
)
def test_mistakes_end_in_one_message(
    run: Callable[..., str], media: Path, tmp_path: Path, arguments: list[str], code: int, what: str
) -> None:
    given = [argument.format(media=media) for argument in arguments]
    assert what in run(*given, "--out", tmp_path / "out.mp4", code=code)
    assert not (tmp_path / "out.mp4").exists() and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("cases", "code", "what"),
    [
        ({}, DATA, "no list of objects"),
        ([], DATA, "no list of objects"),
        ([{"task": "t2v", "prompt": "x"}], DATA, "the case has no name"),
        ([{"name": "a/b", "task": "t2v", "prompt": "x"}], DATA, "cannot be the name of a file"),
        ([{"name": "a", "task": "t2v", "prompt": "x", "video": "a.mp4"}], CONFIG, "did you mean 'videos'?"),
        ([{"name": "a", "task": "t2v", "prompt": "x", "videos": "a.mp4"}], DATA, "a list of files"),
        ([{"name": "a", "task": "t2v", "prompt": "x", "steps": "4"}], CONFIG, "steps has the value '4'"),
        ([{"name": "a", "task": "t2v", "prompt": "x"}, {"name": "a", "task": "t2v", "prompt": "y"}], DATA, "two cases"),
        ([{"name": "a", "task": "t2v", "prompt": "x", "preset": ["r"]}], DATA, "preset is ['r']"),
        ([{"name": "a", "task": "t2v", "prompt": "x", "mode": "t3v"}], CONFIG, "unknown guidance mode"),
        ([{"name": "a", "task": "r2v", "prompt": "x", "images": ["none.png"]}], DATA, "none.png"),
    ],
)
def test_mistakes_in_a_list_are_named_before_anything_is_made(
    run: Callable[..., str], tmp_path: Path, cases: Any, code: int, what: str
) -> None:
    good = [{"name": "good", "task": "t2i", "prompt": "x"}] if isinstance(cases, list) and cases else []
    file = write(tmp_path / "cases.json", [*good, *cases] if isinstance(cases, list) else cases)
    said = run("--cases", file, "--out", tmp_path / "out", code=code)
    assert what in said and "cases.json" in said
    if good:
        assert "case 1" in said or "case 2" in said
    assert not (tmp_path / "out").exists()


def test_planner_of_another_width_is_refused(run: Callable[..., str], tmp_path: Path) -> None:
    wide = write_planner_folder(tmp_path / "wide", gen_dim=20)
    ask = ["--planner", wide, "--task", "t2v", "--prompt", "x", "--out", tmp_path / "a.mp4", *PLANNED]
    said = run(*ask, code=WEIGHTS)
    assert "contexts are 20 wide, the renderer's text features 64" in said

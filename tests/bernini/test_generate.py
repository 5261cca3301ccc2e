"""`bernini generate`, run as a user does, over the toy family."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planners import write_planner_folder
from servers import chat_server, say, send
from torch import Tensor

from bernini.cli import main
from bernini.errors import CheckpointError, ConfigError, DataError, ServiceError
from bernini.generate import GROUPS
from bernini.media import probe_video, read_image, read_video, resize, write_image, write_video
from bernini.pipeline import BerniniPipeline
from bernini.presets import TYPES
from bernini.reasoning import PROPAGATE, conclusion
from bernini.tasks import TASKS
from datamodules.toyworld import make_item

TOY = str(Path(__file__).parents[2] / "assets" / "toy")
FAST = ["--steps", "2"]
PLANNED = ["--planning-steps", "2", "--planning-flow-steps", "1", "--mode", "vae_txt_vit_wapg"]
DRAWN = ["--reasoning-tokens", "12", "--reasoning-temperature", "100"]  # noise, which ends or not as seeds have it
ENDS, ENDLESS = 75, 0
CONFIG, DATA, WEIGHTS = ConfigError.exit_code, DataError.exit_code, CheckpointError.exit_code
SERVICE = ServiceError.exit_code


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


def told(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text())


def test_thinking_is_told_and_its_result_can_be_asked_for(
    run: Callable[..., str], media: Path, planner: str, tmp_path: Path
) -> None:
    ask = ["--planner", planner, *FAST, *DRAWN, *PLANNED[:-2], "--seed", ENDS]
    clip = ["--task", "v2v", "--video", media / "clip.mp4"]
    for name, reasoning in (("text", "text"), ("seen", "vision"), ("again", "vision")):
        run(*ask, *clip, "--prompt", "make it red", "--reasoning", reasoning, "--out", tmp_path / f"{name}.mp4")
    text, seen = told(tmp_path / "text.mp4"), told(tmp_path / "seen.mp4")
    assert text["thought"] and text["thought"] == seen["thought"] and text["settings"]["reasoning"] == "text"
    assert text["explicit_prompt"] == seen["explicit_prompt"] == conclusion(text["thought"]) != text["prompt"]
    assert (text["rendered_task"], text["rendered_prompt"]) == ("v2v", text["explicit_prompt"])
    assert text["edited_frame"] is None and text["rewriter"] is None
    assert (seen["task"], seen["rendered_task"], seen["rendered_prompt"]) == ("v2v", "vi2v", PROPAGATE)
    assert seen["settings"]["mode"] == "rv2v_wapg" and seen["edited_frame"] == str(tmp_path / "seen.frame.png")
    assert made(tmp_path / "seen.mp4").shape == (3, 7, 32, 64) == made(tmp_path / "text.mp4").shape
    assert made(tmp_path / "seen.frame.png").shape == (3, 1, 32, 64)
    for suffix in (".mp4", ".frame.png"):
        first, again = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("seen", "again"))
        assert first == again
    run(*ask, *clip, "--prompt", text["explicit_prompt"], "--out", tmp_path / "direct.mp4")
    assert (tmp_path / "direct.mp4").read_bytes() == (tmp_path / "text.mp4").read_bytes()
    assert told(tmp_path / "direct.mp4")["thought"] is None


def test_cases_think_each_in_its_own_way_whatever_the_ranks(
    run: Callable[..., str], media: Path, planner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = {"task": "v2v", "prompt": "make it red", "videos": [str(media / "clip.mp4")], "seed": ENDS}
    rows = [
        {"name": "a", **edit, "reasoning": "vision"},
        {"name": "b", **edit},
        {"name": "c", **edit, "seed": ENDLESS, "reasoning": "vision"},
        {"name": "d", "task": "t2i", "prompt": "a red ring", "seed": ENDS, "reasoning": "text"},
    ]
    cases = write(tmp_path / "cases.json", rows)
    ask = ["--cases", cases, "--planner", planner, *FAST, *DRAWN, *PLANNED[:-2]]
    with pytest.warns(UserWarning, match=r"case 2: the planner's reasoning came to no end; the prompt stays"):
        run(*ask, "--out", tmp_path / "together", "--batch-size", 4)
    found = {row["name"]: told(tmp_path / "together" / f"{row['name']}{suffix(row['task'])}") for row in rows}
    assert [found[name]["made_together"] for name in "abcd"] == [2, 1, 2, 1]
    assert [found[name]["rendered_task"] for name in "abcd"] == ["vi2v", "v2v", "vi2v", "t2i"]
    assert [found[name]["settings"]["seed"] for name in "abcd"] == [ENDS, ENDS, ENDLESS, ENDS]
    assert found["b"]["thought"] is None and found["a"]["explicit_prompt"] == found["d"]["explicit_prompt"]
    assert found["c"]["explicit_prompt"] == "make it red" and found["c"]["thought"]
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        run(*ask, "--out", tmp_path / "shared")
    for row in rows:
        one = told(tmp_path / "shared" / f"{row['name']}{suffix(row['task'])}")
        assert all(one[key] == found[row["name"]][key] for key in ("thought", "explicit_prompt", "rendered_task"))
    frames = [made(tmp_path / folder / "a.frame.png").int() for folder in ("together", "shared")]
    assert (frames[0] - frames[1]).abs().max() <= 1


def test_another_model_rewrites_what_it_is_to(
    run: Callable[..., str], media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE_OF_KEY", "of-nobody")
    edit = {"task": "v2v", "prompt": "make it red", "videos": [str(media / "clip.mp4")]}
    cases = write(tmp_path / "cases.json", [{"name": "a", **edit}, {"name": "b", **edit, "rewrite": False}])
    with chat_server() as server:
        server.replies = [send("", 503), say("make the ring in video0 red")]
        ask = ["--rewrite", server.url, "--rewrite-model", "some-model", "--rewrite-key", "PLACE_OF_KEY"]
        run("--cases", cases, *ask, "--out", tmp_path / "out", "--batch-size", 2, *FAST)
    assert [(headers["Authorization"], body["model"]) for headers, body in server.asked] == [
        ("Bearer of-nobody", "some-model")
    ] * 2
    changed, kept = (told(tmp_path / "out" / f"{name}.mp4") for name in "ab")
    assert changed["explicit_prompt"] == changed["rendered_prompt"] == "make the ring in video0 red"
    assert changed["rewriter"] == {"url": server.url, "model": "some-model"} and changed["thought"] is None
    assert kept["rendered_prompt"] == "make it red" and kept["explicit_prompt"] is kept["rewriter"] is None
    direct = ["--task", "v2v", "--prompt", changed["explicit_prompt"], "--video", media / "clip.mp4", *FAST]
    run(*direct, "--out", tmp_path / "direct.mp4")
    assert (tmp_path / "direct.mp4").read_bytes() == (tmp_path / "out" / "a.mp4").read_bytes()
    assert "of-nobody" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


def test_no_rewriter_no_output(run: Callable[..., str], tmp_path: Path) -> None:
    with chat_server() as server:
        server.replies = [send("go away", 400)]
        ask = ["--task", "t2i", "--prompt", "a ring", "--rewrite", server.url, "--rewrite-model", "m", *FAST]
        said = run(*ask, "--out", tmp_path / "a.png", code=SERVICE)
    assert "the rewriter refused with status 400" in said and server.url in said
    assert not (tmp_path / "a.png").exists() and not (tmp_path / "a.json").exists()


THINK = ["--prompt", "x", "--planner", "{planner}", "--reasoning"]
ELSEWHERE = ["--rewrite", "http://localhost:1/v1", "--rewrite-model", "m"]
V2V = ["--task", "v2v", "--video", "{media}/clip.mp4"]


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        ([*V2V, "--prompt", "x", "--reasoning", "text"], CONFIG, "reasoning 'text' without a planner"),
        ([*V2V, *THINK, "text", "--no-plan"], CONFIG, "reasoning 'text' without a planner"),
        ([*V2V, *THINK, "loud"], CONFIG, "unknown reasoning 'loud'"),
        ([*V2V, *THINK, "text", *ELSEWHERE], CONFIG, "reasoning 'text' beside a rewriter"),
        (["--task", "t2v", *THINK, "vision"], CONFIG, "task t2v cannot be reasoned about with a frame"),
        ([*V2V, *THINK, "text", "--prompt", " "], DATA, "there is no instruction to rewrite"),
        ([*V2V, *ELSEWHERE], DATA, "there is no instruction to rewrite"),
        ([*V2V, "--prompt", "x", *ELSEWHERE[:2]], CONFIG, "a rewriter without --rewrite-model"),
        ([*V2V, "--prompt", "x", *ELSEWHERE[2:]], CONFIG, "a rewriter without --rewrite"),
        ([*V2V, "--prompt", "x", "--rewrite-key", "K"], CONFIG, "a rewriter without --rewrite"),
        ([*V2V, "--prompt", "x", *ELSEWHERE, "--rewrite-key", "NO_KEY"], CONFIG, "no key in the environment variable"),
        ([*V2V, "--prompt", "x", "--rewrite", "here", "--rewrite-model", "m"], CONFIG, "url cannot be used"),
    ],
)
def test_thoughts_that_cannot_be_are_refused_before_the_model_is_read(
    run: Callable[..., str],
    media: Path,
    planner: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    what: str,
) -> None:
    monkeypatch.setattr(BerniniPipeline, "from_pretrained", None)
    given = [argument.format(media=media, planner=planner) for argument in arguments]
    assert what in run(*given, "--out", tmp_path / "out.mp4", code=code)


def test_help_shows_every_setting_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(TYPES)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')} " in said for name in TYPES) and "{none,text,vision}" in said


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
        (["--task", "t2v", "--prompt", "x", "--planner", "{media}/nowhere"], WEIGHTS, "mllm/config.json"),
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
        ([{"name": "a", "task": "t2v", "prompt": "x", "rewrite": "yes"}], DATA, "rewrite is 'yes'"),
        ([{"name": "a", "task": "t2v", "prompt": "x", "rewrite": True}], CONFIG, "nobody to rewrite the prompt"),
        ([{"name": "a", "task": "t2v", "prompt": "x", "reasoning": "text"}], CONFIG, "without a planner"),
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

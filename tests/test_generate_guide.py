"""The commands and the code of docs/generate.md as they are written there, with the toy family for large models."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from planners import write_planner_folder
from servers import chat_server

from bernini.cli import main
from bernini.media import write_image, write_video
from bernini.presets import PRESETS, Defaults
from bernini.tasks import TASKS
from datamodules.toyworld import make_item

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "generate.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", GUIDE, re.DOTALL)
SHORT = ["--steps", "2", "--reasoning-tokens", "8"]


def make_inputs() -> None:
    """Models, a clip, an image and the guide's cases."""
    for name in ("Bernini-R-Diffusers", "Bernini-Diffusers-v2"):
        shutil.copytree("assets/toy", Path("models") / name)
    write_planner_folder(Path("models/Bernini-Diffusers-v2"), gen_dim=64)
    item = make_item("rv2v", 0, frames=9, height=64, width=64)
    clip, image = (message.media.pixels for message in item.sources[:2])
    write_video("clip.mp4", clip, 16.0)
    write_image("car.png", image)
    (cases,) = (block for kind, block in BLOCKS if kind == "json" and block.startswith("["))
    Path("cases.json").write_text(cases)


@pytest.mark.filterwarnings("ignore:.*reasoning came to no end")  # of a random planner
def test_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("assets").symlink_to(ROOT / "assets")
    make_inputs()
    commands = [shlex.split(line) for kind, block in BLOCKS if not kind for line in block.splitlines()]
    assert len(commands) == 12
    monkeypatch.setenv("OPENAI_API_KEY", "of-nobody")
    for words in commands:
        ranks = 2 if words[0] == "torchrun" else 1
        own = [word for word in words[words.index("generate") :] if word != "--offload"]  # there is no GPU
        for rank in range(ranks):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(ranks))
            with chat_server() as server:
                there = [server.url if word == "http://localhost:8000/v1" else word for word in own]
                assert main([*there, *SHORT]) == 0
                assert len(server.asked) == ("--rewrite" in own)
    made = {path.relative_to("runs/generate").as_posix() for path in Path("runs/generate").rglob("*.*")}
    outputs = {
        "ring.mp4",
        "black.mp4",
        "two.mp4",
        "one.mp4",
        "a.mp4",
        "b.mp4",
        "text.mp4",
        "vision.mp4",
        "vision.frame.png",
        "winter.mp4",
    }
    outputs |= {f"{folder}/{name}" for folder in ("cases", "v2") for name in ("ring.png", "gray.mp4", "blue.mp4")}
    assert {name for name in made if not name.endswith(("json", "safetensors"))} == outputs
    assert Path("edits/car.mp4").is_file() and "a.plan.safetensors" in made
    told = {name: json.loads(Path(f"runs/generate/{name}.json").read_text()) for name in ("text", "vision", "winter")}
    assert told["text"]["thought"] == told["vision"]["thought"] and told["vision"]["edited_frame"]
    assert told["winter"]["explicit_prompt"] == "ok"  # which is all that the server says
    assert json.loads(Path("runs/generate/cases/ring.json").read_text())["settings"]["seed"] == 7
    written: dict[str, torch.Tensor] = {}
    (code,) = (block for kind, block in BLOCKS if kind == "python")
    exec(
        code.replace("pipe.enable_model_cpu_offload()", 'pipe.to("cpu")').replace("seed=7", "seed=7, steps=2"), written
    )
    assert written["frames"].shape == (3, 9, 64, 64) and written["planned"].ndim == 2


def test_table_of_presets_is_the_code() -> None:
    (table,) = re.findall(r"\| preset \|.*?\n\n", GUIDE, re.DOTALL)
    found = {}
    preset = ""
    for line in table.strip().splitlines()[2:]:
        name, tasks, mode, *weights, steps = (cell.strip(" `") for cell in line.strip("|").split("|"))
        preset = name or preset
        for task in TASKS if tasks == "all" else tasks.split(", "):
            found[preset, task] = (mode, *weights, steps)
    found |= {("v2", task): found["v1", task] for task in ("t2i", "i2i")}
    assert found.keys() == {(preset, task) for preset in PRESETS for task in TASKS}
    for (preset, task), (mode, *weights, steps) in found.items():
        settings = Defaults().settle(task, preset != "r", preset)
        names = ("omega_vid", "omega_img", "omega_txt", "omega_tgt", "omega_scale")
        told = [getattr(settings, name) for name in names]
        assert [float(weight) for weight in weights if weight] == [
            own for own, w in zip(told, weights, strict=True) if w
        ]
        assert int(steps) == settings.steps and mode in (settings.mode, "[the task's own](../bernini/tasks.py)")


def test_table_of_tasks_has_all() -> None:
    (table,) = re.findall(r"\| task \| takes.*?\n\n", GUIDE, re.DOTALL)
    told = [name for line in table.splitlines()[2:] if line for name in line.split("|")[1].strip().split(", ")]
    assert sorted(told) == sorted(TASKS)


def test_example_of_a_folder_is_one() -> None:
    (told,) = (json.loads(block) for kind, block in BLOCKS if kind == "json" and block.startswith("{"))
    assert Defaults(told).settle("v2v", True, None).planning_steps == 25

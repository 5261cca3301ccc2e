"""The study of co-training: runs are what they say, verdicts follow the figures, and the path from fit to page."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cotrainings import EVERY, WIDTH, make_cotraining_config, make_planner_folder
from factories import callback, fit, make_wan_folder
from planners import ADDED, make_planner_config

from benchmarks.quality.cotraining_study import __main__ as study
from benchmarks.quality.cotraining_study.runs import Run
from benchmarks.quality.cotraining_study.scoring import NEEDED, PARTS, Model
from benchmarks.quality.cotraining_study.table import Records, page
from benchmarks.quality.plans.exam import ANSWERED, Exam
from bernini.errors import ConfigError, DataError
from bernini.flow.guidance import Omegas
from bernini.renderer.sampling import SamplingConfig

ROOT = Path(__file__).parents[2]
SCHEDULE = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.003, "total_steps": 3}}
FEW = [
    "--items=2",
    "--probe-items=20",
    "--frames=5",
    "--size=32",
    "--device=cpu",
    "--batch=2",
    "--steps=1",
    "--workers=0",
]
REASON = ("i2i/reason", "v2v/reason")


def test_the_study_needs_neither_av_nor_wandb_and_its_reading_processes_no_models() -> None:
    def modules_after(import_: str) -> set[str]:
        code = f"import sys, {import_}; print(*{{m.partition('.')[0] for m in sys.modules}})"
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout.split())

    commands = modules_after("benchmarks.quality.cotraining_study.__main__")
    assert "benchmarks" in commands and not commands & {"av", "wandb", "webdataset"}
    reading = modules_after("benchmarks.quality.cotraining_study.items, benchmarks.quality.scoring")
    assert "benchmarks" in reading and not reading & {"av", "wandb", "webdataset", "lightning", "transformers"}


# -- from records to the page ------------------------------------------------------------------------------------------


def write_run(folder: Path, variant: str, seed: int, shares: dict[str, float], answers: float = 0.0, **training: Any):
    """Scores of four items of each category, of which a way gets so many edits done."""
    exposure = {"visible": 1.0, "full": 0.0, "planned": 0.0, "noised": 0.0}
    if variant in exposure:
        exposure |= {"visible": 0.5, variant: 0.5, **({"level": 0.3} if variant == "noised" else {})}
    start = {"cold": "before"}.get(variant, "warmup")
    recipe = {"steps": 7, "lr": 0.1, "tasks": {"v2v": 2, "t2v": 1}, "batch_size": 5, "length": 100}
    told = {"name": f"{variant}-{seed}", "start": f"{start}-{seed}", "banked": True, "recipe": recipe, "seed": seed}
    told |= {"start": "toy-sight"} if variant == "before" else {}
    told |= {"whole": False, "exposure": None if variant == "before" else exposure} | training
    begun = {**told, "name": f"{start}-{seed}", "start": f"before-{seed}"}
    omegas = {"vid": 1.0, "img": 1.0, "txt": 2.0, "tgt": 1.0, "scale": 1.0}
    settings = {
        "exam": {"items": 4, "probe_items": 9, "frames": 5, "size": 32},
        "sampling": {"steps": 2, "solver": "unipc", "mode": "vae_txt_vit", "without": "v2v", "omegas": omegas},
        "planning": {"steps": 25, "flow_steps": 5, "txt": 1.2, "img": 1.0},
    }
    facts = {"variant": variant, "training": told, "start": None if told["start"].startswith("toy") else begun}
    facts |= {"settings": settings, "environment": {"processor": "P", "gpu": "G", "torch": "2", "date": "D"}}
    plans = [{"found": 1.0, "cosine": 0.5, "error": 1.0, "spread": 4.0, "asked": [0], "right": [0], "right_true": [0]}]
    for part in PARTS:
        if part in ANSWERED:
            found: dict[str, Any] = {"answers": [{"right": n < 4 * answers} for n in range(4)]}
        else:
            edit = {"edit_done", "rest_unchanged"} if part in ("v2v", *REASON) else set()
            ways = {way: v for way, v in shares.items() if way not in ("text", "vision") or part in REASON}
            scores = {
                way: [dict.fromkeys({"attributes", *edit}, float(n < 4 * share)) for n in range(4)]
                for way, share in ways.items()
                if way != "vision" or part == "v2v/reason"
            }
            for row in scores.get("text", []):
                row["concluded"] = 1.0
            found = {"scores": scores, "plans": plans * 4}
        file = folder / f"{variant}-{seed}" / f"{part.replace('/', '-')}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**facts, **found}))


def write_study(folder: Path, seeds: tuple[int, ...] = (0, 1)) -> Path:
    """A study in which only the renderer of noised plans makes use of predicted ones."""
    write_run(folder, "before", 0, {"without": 0.25, "predicted": 0.25, "true": 0.25}, answers=1.0)
    for seed in seeds:
        write_run(folder, "paper", seed, {"without": 0.25, "predicted": 0.25, "true": 1.0})
        write_run(folder, "cold", seed, {"without": 0.25, "predicted": 0.0, "true": 0.25})
        write_run(folder, "noised", seed, {"without": 0.25, "predicted": 1.0, "true": 1.0}, answers=1.0)
    ways = {"without": 0.25, "predicted": 0.5, "true": 1.0, "text": 1.0, "vision": 0.5}
    write_run(folder, "thinking", 0, ways, start="toy-cot", whole=True)
    return folder


def test_verdicts_follow_the_figures(tmp_path: Path) -> None:
    text = page(Records(write_study(tmp_path)))
    assert "paper's recipe: predicted less none +0.0 [+0.0, +0.0], not told apart; true less predicted +75.0 [" in text
    assert "which is noised plans: predicted less none +75.0 [" in text
    assert "], better; true less predicted +0.0 [+0.0, +0.0]." in text
    assert (
        "| no warm-up | true plan | 25.0 [" in text and "| paper's recipe | true plan | 100.0 [100.0, 100.0] |" in text
    )
    assert "| noised plans (50%): no plan | +0.0 [+0.0, +0.0] not told apart |" in text
    assert "| paper's recipe, less before | -100.0 [-100.0, -100.0] worse |" in text
    assert "| noised plans, less before | +0.0 [+0.0, +0.0] not told apart |" in text
    assert "| vision |  | 50.0 [" in text and "| vision less text | -50.0 [" in text
    assert "rightly, word for word: 100.0" in text
    assert "- G, torch 2, D: before-0, cold-0, cold-1, noised-0," in text


def test_the_page_has_the_commands_that_made_it(tmp_path: Path) -> None:
    text = page(Records(write_study(tmp_path)))
    block = text.rpartition("```\nRUN=")[2].partition("\n```")[0]
    lines = f"RUN={block}".replace("\\\n", " ").splitlines()
    assert lines[0].startswith("RUN=runs/cotraining/before-0 bernini fit -c configs/toy/planner.yaml")  # once, for all
    fits = [shlex.split(line) for line in [*lines[2:-4], lines[-3]]]
    assert lines[1] == "for seed in 0 1; do" and lines[-4] == "done"
    named = [f"{variant}-$seed" for variant in ("warmup", "paper", "cold", "noised")]
    assert [words[0] for words in fits] == [f"RUN=runs/cotraining/{name}" for name in [*named, "thinking-0"]]
    begun = [words[words.index("--model.init_from.planner") + 1] for words in fits]
    before, warm = "runs/cotraining/before-0/planner", "runs/cotraining/warmup-$seed/model"
    assert begun == [before, warm, before, warm, "runs/toy-cot/model"]
    assert shlex.split(lines[0])[shlex.split(lines[0]).index("--model.init_from") + 1] == "runs/toy-sight/planner"
    exposed = {words[0]: words[words.index("--model.exposure") + 1] for words in fits if "--model.exposure" in words}
    assert exposed == {"RUN=runs/cotraining/noised-$seed": "{visible: 0.5, noised: 0.5, level: 0.3}"}
    begin = "python -m benchmarks.quality.cotraining_study "
    score, table = (shlex.split(line.removeprefix(begin)) for line in lines[-2:])
    assert study.parse(score).runs == [Path("runs/cotraining/{before,paper,cold,noised,thinking}-[0-9]*")]
    assert study.parse(score).omega_txt == 2 and study.parse(score).items == 4 and study.parse(table).verb == "table"


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"paper: seeds \[\]"):
        Records(tmp_path)
    shares = dict.fromkeys(("without", "predicted", "true"), 0.5)
    write_run(write_study(tmp_path / "seeds"), "cold", 2, shares)
    with pytest.raises(DataError, match=r"cold: seeds \[0, 1, 2\]"):
        Records(tmp_path / "seeds")
    other = {"recipe": {"steps": 8, "tasks": {"v2v": 2}}}
    write_run(write_study(tmp_path / "recipe"), "noised", 1, shares, **other)
    with pytest.raises(DataError, match="differ in recipe"):
        Records(tmp_path / "recipe")
    more = {"exposure": {"visible": 0.2, "noised": 0.8}}
    write_run(write_study(tmp_path / "exposure"), "noised", 1, shares, **more)
    with pytest.raises(DataError, match=r"differ in exposure\n(.|\n)*noised-0, noised-1 are"):
        Records(tmp_path / "exposure")
    file = write_study(tmp_path / "settings") / "cold-1" / f"{NEEDED[0].replace('/', '-')}.json"
    told = json.loads(file.read_text())
    told["settings"]["sampling"]["steps"] = 3
    file.write_text(json.dumps(told))
    with pytest.raises(DataError, match="differ in settings"):
        Records(tmp_path / "settings")
    file.unlink()
    with pytest.raises(DataError, match=r"not scored to the end\n.*cold-1"):
        Records(tmp_path / "settings")


def test_the_published_page_is_made_from_the_published_records(tmp_path: Path) -> None:
    results = ROOT / "docs" / "results"
    with tarfile.open(results / "cotraining.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert page(Records(tmp_path)) == (results / "cotraining.md").read_text()


# -- from fit to records -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def runs(family: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A planner, and trainings of one step as the callbacks leave them; those that go without are copies."""
    root = tmp_path_factory.mktemp("runs")
    folders = {name: root / f"{name}-0" for name in ("before", "warmup", "paper", "cold", "thinking")}
    sight = make_planner_folder(root / "sight" / "planner")
    shape = {**ADDED, "gen_dim": WIDTH}
    config = make_planner_config(
        folders["before"], 1, mllm=None, init_from=str(sight), planner=shape, lr_scheduler=SCHEDULE
    )
    config["trainer"]["callbacks"].append(callback("callbacks.SavePlanner", folder=f"{folders['before']}/planner"))
    _fit(config)
    stages = [{"train": [part for part in EVERY if part != "vit"]}]  # one tower and one pair of probes for all
    for name, start in (("warmup", folders["before"] / "planner"), ("paper", folders["warmup"] / "model")):
        config = make_cotraining_config(family, start, folders[name], 1, stages=stages, lr_scheduler=SCHEDULE)
        for part in ("SavePlanner", "SaveRenderer"):
            config["trainer"]["callbacks"].append(callback(f"callbacks.{part}", folder=f"{folders[name]}/model"))
        _fit(config)
    for name, start in (("cold", "before-0/planner"), ("thinking", "paper-0/model")):
        shutil.copytree(folders["paper"], folders[name])
        change(folders[name], "model.init_from.planner", str(root / start))
    change(folders["thinking"], "model.init_from.renderer", str(folders["paper"] / "model"))
    change(folders["thinking"], "data.tasks", {"v2v": 1, "v2v/cot": 1})
    return folders


def _fit(config: dict[str, Any]) -> None:
    config["seed_everything"] = 0
    config["trainer"]["limit_val_batches"] = 0
    fit(config)


def change(run: Path, key: str, value: Any) -> None:
    """Change what a run's configuration says under ``init_args``, or of all."""
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    first, *rest, last = key.split(".")
    node = config[first]["init_args"] if rest or first == "data" else config[first]
    for name in rest:
        node = node[name]
    node[last] = value
    path.write_text(yaml.safe_dump(config))


def test_from_fit_to_page(
    runs: dict[str, Path], family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "scores")]
    scored = [str(run) for name, run in runs.items() if name != "warmup"]
    parts = [part for part in PARTS if part in (*NEEDED, "t2i", "v2v")]
    few = ["score", *scored, *FEW, "--tasks", "v2v", "t2i", "--family", str(family), *out]
    study.main(few)
    told = capsys.readouterr().out
    assert "before-0: v2v/reason: without " in told and "thinking-0: v2v/reason: without " in told
    for name in ("before", "paper", "cold", "thinking"):
        files = {part: tmp_path / "scores" / f"{name}-0" / f"{part.replace('/', '-')}.json" for part in parts}
        for part, file in files.items():
            found = json.loads(file.read_text())
            if part in ANSWERED:
                assert len(found["answers"]) == 2
                continue
            ways = {"without", "predicted", "true"}
            if name == "thinking" and part in REASON:
                ways |= {"text"} | ({"vision"} if part == "v2v/reason" else set())
            assert set(found["scores"]) == ways and len(found["plans"]) == 2
            keys = [[row["key"] for row in rows] for rows in found["scores"].values()]
            assert len(keys[0]) == 2 and all(own == keys[0] for own in keys)
    paper = json.loads((tmp_path / "scores" / "paper-0" / "v2v.json").read_text())
    assert paper["start"]["name"] == "warmup-0" and paper["training"]["recipe"]["batch_size"] == 4

    study.main(["table", *out, "--page", str(tmp_path / "docs" / "cotraining.md")])
    text = (tmp_path / "docs" / "cotraining.md").read_text()
    assert text.count("--model.init_from.renderer runs/cotraining/paper-$seed/model") == 1  # of thinking
    assert "--tasks t2i v2v" in text and text.count("| with reasoning | true plan |") == 4 and "nan" not in text

    (tmp_path / "scores" / "cold-0" / "v2v-reason.json").unlink()  # goes on with what is missing, and with that alone
    study.main(few)
    told = capsys.readouterr().out
    assert "paper-0: scored already" in told and "cold-0: v2v/reason: " in told and "cold-0: v2v: " not in told
    with pytest.raises(ConfigError, match="scores of other settings"):
        study.main([*few, "--steps", "2"])


def test_a_true_plan_is_rendered_as_a_predicted_one_is(runs: dict[str, Path], family: Path) -> None:
    sampling = SamplingConfig(steps=2, mode="vae_txt_vit", omegas=Omegas(1.0, 1.0, 1.0, 1.0, 1.0))
    model = Model(Run.read(runs["paper"]), family, sampling, torch.device("cpu"))
    items, seeds = Exam(2, 1, 5, 32).held_out("v2v/reason"), [3, 4]
    plans = model.plan(items, seeds)
    predicted = model.render(items, seeds, plans)
    same = model.render(items, seeds, model.adopt(items, [plan.embeds for plan in plans]))
    other = model.render(items, seeds, model.adopt(items, [plan.embeds + 9 for plan in plans]))
    for a, b, c in zip(predicted, same, other, strict=True):
        assert a.shape == (3, 5, 32, 32) and (a.int() - b.int()).abs().max() <= 1
        assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("name", "key", "value", "why"),
    [
        ("paper", "model.exposure.noised", 0.5, "reads these plans"),
        ("paper", "model.init_from.planner", "runs/before-0/planner", "goes on from before-0, not from warmup"),
        ("cold", "data.tasks", {"v2v/cot": 1}, "what `thinking` has"),
    ],
)
def test_a_run_is_what_its_name_says(runs: dict[str, Path], name: str, key: str, value: Any, why: str) -> None:
    run = runs[name]
    before = (run / "config.yaml").read_text()
    assert Run.read(run).variant == name
    try:
        change(run, key, value)
        with pytest.raises(DataError, match=why):
            Run.read(run)
    finally:
        (run / "config.yaml").write_text(before)


def test_folders_that_are_no_runs_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a name is a variant and a seed"):
        Run.read(runs["warmup"])
    with pytest.raises(DataError, match="no finished run"):
        study.main(["score", str(tmp_path / "paper-0")])
    other = shutil.copytree(runs["cold"], tmp_path / "cold-3")
    shutil.copytree(runs["before"], tmp_path / "before-0")
    with pytest.raises(DataError, match="its seed is 0"):
        Run.read(other)
    alone = shutil.copytree(runs["before"], tmp_path / "paper-0")
    with pytest.raises(DataError, match="a planner that was trained alone"):
        Run.read(alone)


def test_the_guides_commands_can_be_given() -> None:
    begin = "python -m benchmarks.quality.cotraining_study "
    lines = (ROOT / "docs" / "cotraining.md").read_text().splitlines()
    given = [study.parse(shlex.split(line.removeprefix(begin))) for line in lines if line.startswith(begin)]
    assert [options.verb for options in given] == ["score", "table"]

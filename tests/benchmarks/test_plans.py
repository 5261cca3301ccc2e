"""Plan quality as a command: figures of a saved planner, intervals, and what lies in the folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planners import TOKENIZER, VISION, make_planner

from benchmarks.quality.interface import interval
from benchmarks.quality.plans.__main__ import run
from benchmarks.quality.plans.exam import PLANNED, Exam, ProbeTargets, Sheets
from benchmarks.quality.plans.figures import METRICS, bounds, statistic
from benchmarks.quality.plans.measuring import Truth, answer, load, measure, plan
from bernini.errors import CheckpointError, ConfigError
from bernini.media import read_image
from bernini.planner.planning import PlanningConfig
from bernini.planner.settings import PlannerSettings
from bernini.planner.vision import VisionConfig
from callbacks import SavePlanner

ROOT = Path(__file__).parents[2]
EXAM = Exam(items=5, probe_items=60, frames=5, size=32)
OPTIONS = ["--items=5", "--probe-items=60", "--frames=5", "--size=32", "--device=cpu", "--batch=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planner as SavePlanner leaves it, with a flow shift of its own, whose flow head does not begin at zero."""
    root = tmp_path_factory.mktemp("planner")
    module = make_planner()
    for parameter in module.planner.vit_decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    module.config.flow_shift = 3.0
    SavePlanner(str(root)).save(module, write=True)
    return root


@pytest.fixture(scope="module")
def truth(folder: Path) -> Truth:
    model, template = load(folder, torch.float32, torch.device("cpu"))
    return Truth(model, Sheets(EXAM, template), batch=3)


def test_a_saved_planner_says_what_its_weights_do_not(folder: Path, tmp_path: Path, truth: Truth) -> None:
    assert PlannerSettings.of(folder) == PlannerSettings(3.0, VisionConfig(**VISION))
    assert PlannerSettings.of(tmp_path) == PlannerSettings(2.0, VisionConfig())  # a released folder
    assert truth.model.vit_decoder.config.shift == 3.0 and truth.sheets.template.vision == VisionConfig(**VISION)
    (tmp_path / "bernini").mkdir()
    (tmp_path / "bernini" / "planner.json").write_text('{"vision": {"patches": 8}}')
    with pytest.raises(CheckpointError, match="settings cannot be read"):
        PlannerSettings.of(tmp_path)


def test_figures_of_records_are_those_of_the_metrics(truth: Truth) -> None:
    generator = torch.Generator().manual_seed(0)
    for category in ("t2i", "v2v/reason"):
        true = truth.embeds(category)
        noise = true.std() * torch.randn(true.shape, generator=generator)
        measured = measure(truth, category, true + noise)
        assert [record["key"] for record in measured.records] == [s.key for s in truth.sheets.planned(category)]
        for metric in METRICS:
            value = statistic(measured.records, metric)(np.ones((1, EXAM.items)))[0]
            assert value == pytest.approx(measured.figures[metric], rel=1e-4), metric
    perfect = measure(truth, "v2v", truth.embeds("v2v"))
    wanted = {"cosine": 1, "explained_variance": 1, "retrieval@1": 1, "probe_relative": 1, "gallery": EXAM.items}
    assert {name: pytest.approx(perfect.figures[name]) for name in wanted} == wanted
    assert all(record["right"] == record["right_true"] for record in perfect.records)


def test_the_shipped_toy_planner_sees_plans_and_reasons() -> None:
    exam = Exam(items=24, probe_items=24)
    model, template = load(ROOT / "assets" / "toy" / "planner", torch.float32, torch.device("cpu"))
    truth = Truth(model, Sheets(exam, template), batch=24)
    for category in ("t2i", "v2v/reason"):
        (planned,) = plan(model, truth.sheets.planned(category), [PlanningConfig(steps=8)], 24)
        figures = measure(truth, category, planned).figures
        assert figures["retrieval@1"] > 0.9 and figures["cosine"] > 0.9, category
    assert sum(answered["right"] for answered in answer(model, truth.sheets.asked("und_img"), 24)) > 20


def test_reasoning_edits_are_a_category_and_every_target_is_held_out(truth: Truth) -> None:
    assert {"i2i/reason", "v2v/reason", "t2v", "mv2v"} <= set(PLANNED)
    for category in ("v2v", "v2v/reason"):
        edits = {sample.info["truth"]["edit"] for sample in EXAM.held_out(category)}
        assert ("reason" in edits) == (category == "v2v/reason")


def test_a_probe_learns_the_same_whoever_draws(truth: Truth) -> None:
    for moving in (False, True):
        drawn = ProbeTargets(EXAM, moving, truth.sheets.template.vision)
        assert all(visual.is_video == moving for visual, _ in map(drawn.__getitem__, range(len(drawn))))
        here, there = truth.probe(moving), Truth(truth.model, truth.sheets, truth.batch, workers=2).probe(moving)
        embeds = truth.embeds("t2v" if moving else "t2i")
        assert torch.equal(here.read(embeds), there.read(embeds))


def test_a_plan_is_the_samples_own(truth: Truth) -> None:
    sheets = truth.sheets.planned("v2v")
    few, more = PlanningConfig(steps=2, flow_steps=1), PlanningConfig(steps=2, flow_steps=3)
    together = plan(truth.model, sheets, [few, more], batch=5)
    alone = plan(truth.model, sheets[3:4], [more], batch=1)
    torch.testing.assert_close(together[1][3:4], alone[0])
    assert not torch.allclose(together[0], together[1])


def test_shares_have_wilsons_interval() -> None:
    records = [{"right": number < 3} for number in range(4)]
    assert bounds(records, "answers") == pytest.approx((0.75, *interval(0.75, 4)))
    assert bounds(records[:3], "answers")[1] < 0.5  # three of three are not a hundred percent


def test_answers_are_those_of_validation(folder: Path, truth: Truth) -> None:
    module = make_planner(init_from=str(folder), tokenizer=TOKENIZER)
    chats = EXAM.held_out("und_vid")
    means = module.losses(chats, [("test", n) for n in range(len(chats))], train=False)[1].means()
    records = answer(truth.model, truth.sheets.asked("und_vid"), batch=2)
    assert sum(record["right"] for record in records) / len(records) == means["answers"].item()
    assert [record["key"] for record in records] == [chat.key for chat in chats]


def test_the_command_leaves_records_a_table_and_a_page(folder: Path, tmp_path: Path, capsys: Any) -> None:
    tasks = ["--tasks", "r2v", "i2i/reason", "und_img"]
    ways = ["--steps=3", "--flow-steps=2", "--order=halton", "--txt=1", "--img=1", "--examples=1"]
    scores = run(["--model", str(folder), "--out", str(tmp_path), *tasks, *ways, *OPTIONS])
    assert json.loads((tmp_path / "plans.json").read_text()) == scores
    assert scores["planning"]["order"] == "halton" and scores["exam"]["items"] == 5
    assert {name: len(own["records"]) for name, own in scores["plans"].items()} == {"r2v": 5, "i2i/reason": 5}
    assert [len(own) for own in scores["answers"].values()] == [5]
    table = (tmp_path / "table.md").read_text()
    assert "| r2v | 5 |" in table and "| question | und_img |" in table and table in capsys.readouterr().out
    assert "--order=halton" in (tmp_path / "report.html").read_text()
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert [name.split("-", 1)[0] for name in pictures if "target" in name] == ["i2i", "r2v"]
    drawn = read_image(tmp_path / "pictures" / next(name for name in pictures if "target" in name)).pixels
    assert drawn is not None and drawn.shape == (3, 1, 32 + 2 + 32, 32)


def test_what_cannot_be_asked_is_refused(folder: Path, tmp_path: Path) -> None:
    given = ["--model", str(folder), "--out", str(tmp_path)]
    with pytest.raises(ConfigError, match="--probe-items is at least 1"):
        run([*given, "--probe-items", "0"])
    with pytest.raises(CheckpointError, match="the planner cannot be read"):
        run(["--model", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        run([*given, "--tasks", "v2w"])

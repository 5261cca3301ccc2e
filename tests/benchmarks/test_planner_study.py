"""The study of planner training: what is compared, verdicts that follow the figures, and the path from fit to page."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from factories import callback, fit
from planners import make_planner_config

from benchmarks.quality.planner_study import __main__ as study
from benchmarks.quality.planner_study.scoring import COMPARED, USUAL, WAYS, Run, way
from benchmarks.quality.planner_study.table import Records, page
from benchmarks.quality.plans import __main__ as plans
from benchmarks.quality.plans.exam import ANSWERED, PLANNED
from bernini.errors import DataError

ROOT = Path(__file__).parents[2]
EVERY = {way(config) for values in WAYS.values() for config in values.values()}
FEW = ["--items=3", "--probe-items=30", "--frames=5", "--size=32", "--device=cpu", "--batch=3"]


def write_study(
    folder: Path, found: dict[str, float], answers: dict[str, float], seeds: tuple[int, ...] = (0, 1)
) -> None:
    """A study of four items, of which each variant finds and answers so many; plans in one step find none."""
    facts = {
        "recipe": {"steps": 7, "batch": 5, "lr": 0.1, "samples": 100},
        "exam": {"items": 4, "probe_items": 9, "frames": 5, "size": 32},
        "environment": {"processor": "P", "gpu": "G", "torch": "2", "date": "D"},
    }

    def said(share: float) -> dict[str, Any]:
        return {task: [{"key": f"{n}", "kind": "k", "right": n < 4 * share} for n in range(4)] for task in ANSWERED}

    def planned(share: float) -> list[dict[str, Any]]:
        read = {"asked": [0, 1], "right": [0], "right_true": [0, 1]}
        same = {"cosine": share, "error": 1.0, "spread": 4.0, **read}
        return [{"key": f"{n}", "found": float(n < 4 * share), **same} for n in range(4)]

    folder.mkdir()
    (folder / "before.json").write_text(json.dumps({**facts, "answers": said(answers["before"])}))
    for variant, share in found.items():
        for seed in seeds:
            made = {name: dict.fromkeys(PLANNED if name == way(USUAL) else COMPARED, planned(share)) for name in EVERY}
            made[way(WAYS["steps"]["1"])] = dict.fromkeys(COMPARED, planned(0))
            run = {"variant": variant, "seed": seed, **facts, "plans": made, "answers": said(answers[variant])}
            (folder / f"{variant}-{seed}.json").write_text(json.dumps(run))


def test_one_thing_is_varied_at_a_time() -> None:
    assert len(EVERY) == 1 + 4 + 2 + 2 + 1
    assert all(way(USUAL) in map(way, values.values()) for values in WAYS.values())
    assert set(COMPARED) < set(PLANNED)


def test_verdicts_follow_the_figures(tmp_path: Path) -> None:
    shares = {"beta": 1.0, "uniform": 0.0, "silent": 0.5}
    write_study(tmp_path / "a", shares, {"before": 1.0, "beta": 1.0, "uniform": 1.0, "silent": 0.0})
    text = page(Records(tmp_path / "a"))
    row = "100.0 [100.0, 100.0] | 75.0 [75.0, 75.0] | 100.0 [100.0, 100.0] | 50.0 [50.0, 50.0] | 100.0 [100.0, 100.0]"
    assert f"| v2v/reason | {row} | 50.0 [50.0, 50.0] |" in text
    assert "| t2v | +100.0 [+100.0, +100.0] better | +0.0 [+0.0, +0.0] not told apart |" in text
    assert "| Beta masks | 1 | 0.0 [0.0, 0.0] |" in text and "| Beta masks | **25** | 100.0 [100.0, 100.0] |" in text
    assert "| Beta masks, less before | +0.0 [+0.0, +0.0] not told apart |" in text
    assert "| Beta masks, no language loss, less before | -100.0 [-100.0, -100.0] worse |" in text
    assert text.count("with the language loss less those of training without") == 1
    assert "--model.loss.ratios uniform" in text and "for seed in 0 1; do" in text


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    same = dict.fromkeys(("before", "beta", "uniform"), 0.5)
    with pytest.raises(DataError, match="nothing tells"):
        Records(tmp_path)
    write_study(tmp_path / "a", {"beta": 0.5}, same)
    with pytest.raises(DataError, match=r"uniform: seeds \[\]"):
        Records(tmp_path / "a")
    write_study(tmp_path / "b", {"beta": 0.5, "uniform": 0.5}, same)
    other = json.loads((tmp_path / "b" / "uniform-1.json").read_text())
    for name, value in (("exam", {"items": 5}), ("recipe", {"steps": 8})):
        (tmp_path / "b" / "uniform-1.json").write_text(json.dumps({**other, name: value}))
        with pytest.raises(DataError, match=f"differ in {name}"):
            Records(tmp_path / "b")


def trained(run: Path, **model: Any) -> Path:
    """Train for two steps and leave the planner in ``planner/``."""
    schedule = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.003, "total_steps": 3}}
    config = make_planner_config(run, 2, lr_scheduler=schedule, **model)
    config["seed_everything"] = 0
    config["trainer"]["limit_val_batches"] = 0
    config["trainer"]["callbacks"].append(callback("callbacks.SavePlanner", folder=str(run / "planner")))
    fit(config)
    return run


def test_from_fit_to_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "scores")]
    with pytest.raises(DataError, match="no finished run"):
        study.main(["score", str(tmp_path), *out])
    before = trained(tmp_path / "sight", train_vit=True)
    losses = {"beta": {}, "uniform": {"ratios": "uniform"}, "silent": {"ntp": 0.0}}
    runs = [
        trained(tmp_path / f"{name}-0", mllm=None, init_from=str(before / "planner"), loss=loss)
        for name, loss in losses.items()
    ]
    assert [Run.read(run).variant for run in runs] == list(losses)
    study.main(["before", str(before), *FEW, *out])
    study.main(["score", *map(str, runs), *FEW, *out])
    assert "beta-0: v2v/reason: retrieval@1 " in capsys.readouterr().out
    for name in losses:
        scores = json.loads((tmp_path / "scores" / f"{name}-0.json").read_text())
        assert (scores["variant"], scores["seed"]) == (name, 0)
        assert scores["recipe"] == {"steps": 2, "batch": 6, "lr": 0.003, "samples": 600}
        assert set(scores["plans"]) == (EVERY if name != "silent" else {way(USUAL)})
        assert set(scores["plans"][way(USUAL)]) == set(PLANNED) and set(scores["answers"]) == set(ANSWERED)
        assert all(len(records) == 3 for own in scores["plans"].values() for records in own.values())
    study.main(["table", *out, "--page", str(tmp_path / "docs" / "planner.md")])
    text = (tmp_path / "docs" / "planner.md").read_text()
    assert text.count("| uniform masks | halton |") == 3 and "--trainer.max_steps 2 " in text


def test_the_guides_commands_can_be_given() -> None:
    lines = (ROOT / "docs" / "planner.md").read_text().splitlines()
    for name, parse in (("plans", plans.parse), ("planner_study", study.parse)):
        begin = f"python -m benchmarks.quality.{name} "
        given = [parse(shlex.split(line.removeprefix(begin))) for line in lines if line.startswith(begin)]
        assert len(given) >= 2
    configs = {word for line in lines if line.startswith("bernini fit") for word in line.split() if "/" in word}
    assert configs and all((ROOT / config).is_file() for config in configs)

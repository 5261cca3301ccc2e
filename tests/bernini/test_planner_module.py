"""Planner training by the command line: losses that fall, exact resuming, what is learned and what stays."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import fit, logged_rows
from planners import make_planner, make_planner_config, make_planner_samples

from bernini.planner.learning import LossConfig
from bernini.planner.planning import PlanningConfig

KEYS = [("test", number) for number in range(3)]


def test_a_resumed_fit_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    def run(name: str, steps: int, *more: str) -> dict[str, torch.Tensor]:
        fit(make_planner_config(tmp_path / name, steps), *more)
        return torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"]

    whole = run("whole", 8)
    start = run("broken", 4)
    resumed = run("broken", 8, "--ckpt_path", "auto")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    changed = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert any(name.startswith("planner.vit_decoder") for name in changed) and "planner.mask_tokens" in changed
    assert not any(".visual." in name or ".proj_gen." in name for name in changed)
    rows = logged_rows(tmp_path / "whole")
    names = {"loss", "visual", "visual_t2i", "visual_v2v", "ntp", "accuracy", "answers"}
    assert [row["step"] for row in rows] == [1, 3, 5, 7]
    assert all(row.keys() == {"step", *(f"train/{name}" for name in names)} for row in rows)
    assert logged_rows(tmp_path / "broken")[-1] == pytest.approx(rows[-1])
    assert [row["step"] for row in logged_rows(tmp_path / "whole", "val")] == [3, 7]


def test_losses_fall() -> None:
    module, samples = make_planner(), make_planner_samples()
    optimizer = torch.optim.AdamW(module.trainable(), lr=3e-3)
    seen = []
    for step in range(60):
        loss, table = module.losses(samples, [(*key, step) for key in KEYS], train=False)
        seen.append({name: value.item() for name, value in table.means().items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first, last = ({name: sum(row[name] for row in rows) / 10 for name in seen[0]} for rows in (seen[:10], seen[-10:]))
    assert last["visual"] < 0.9 * first["visual"] and last["ntp"] < 0.5 * first["ntp"]
    assert last["accuracy"] > first["accuracy"]


def test_the_loss_weighs_its_parts() -> None:
    module, samples = make_planner(loss=LossConfig(ntp=0.25, visual=2.0)), make_planner_samples()
    loss, table = module.losses(samples, KEYS, train=False)
    means = table.means()
    torch.testing.assert_close(loss, 0.25 * means["ntp"] + 2.0 * means["visual"])
    chat, _ = module.losses(samples[1:2], KEYS[1:2], train=False)
    torch.testing.assert_close(chat, 0.25 * means["ntp"])  # it saw nothing of its neighbours


def test_padding_is_not_measured() -> None:
    module, samples = make_planner(), make_planner_samples()
    measured = module.losses(samples[:2], KEYS[:2], train=False)[1].means()
    padding = replace(samples[2], info={"padding": True})
    padded = module.losses([*samples[:2], padding], KEYS, train=False)[1].means()
    assert padded.keys() == measured.keys() and "visual_t2i" not in padded
    torch.testing.assert_close(padded["ntp"], measured["ntp"])


def test_plans_are_of_the_target_and_leave_the_training_mode() -> None:
    module = make_planner(planning=PlanningConfig(steps=2, flow_steps=2))
    video, _, image = make_planner_samples()
    plans = module.plan([video, image], seeds=[1, 2])
    assert [plan.embeds.shape for plan in plans] == [(4, 32), (4, 32)]  # the clip gives one pair of frames
    assert module.planner.training
    (alone,) = module.plan([image], seeds=[2])
    torch.testing.assert_close(alone.embeds, plans[1].embeds)

"""Plans in validation: what is planned and measured, answers that are right, and training that does not notice."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import fit, logged_rows
from lightning.pytorch.strategies import SingleDeviceStrategy
from planners import SIZE, make_planner, make_planner_config, make_planner_samples

from bernini.conversation import Conversation
from bernini.errors import ConfigError, DataError
from bernini.planner.module import PlannerModule
from bernini.planner.planning import PlanningConfig
from bernini.planner.template import PlannerSample, pack
from bernini.planner.validation import PlanMeter, PlanValidation, right_tokens, true_target
from datamodules.toyworld import make_item, make_question

CPU = torch.device("cpu")
ALONE = SingleDeviceStrategy(CPU)


def planned_run(run: Path, samples: int, **model: Any) -> dict[str, Any]:
    model = {"planning": {"steps": 2, "flow_steps": 2}, "validation": {"samples": samples}, **model}
    return make_planner_config(run, 4, **model)


def test_validation_plans_and_training_does_not_notice(tmp_path: Path) -> None:
    lora = {"rank": 2, "dropout": 0.2}
    records, weights = [], []
    for name, samples, limit in (("planned", 3, 1.0), ("measured", 0, 1.0), ("blind", 3, 0)):
        config = planned_run(tmp_path / name, samples, lora=lora)
        config["trainer"] |= {"limit_val_batches": limit, "val_check_interval": 2}
        records.append(fit(config)[0])
        weights.append(torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"])
    assert records[0]["losses"] == records[1]["losses"] == records[2]["losses"]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][key], other[key]) for key in weights[0])
    rows, plain = (logged_rows(tmp_path / name, "val") for name in ("planned", "measured"))
    assert [row["step"] for row in rows] == [1, 3]
    quality = {"plan_cosine", "plan_explained_variance", "plan_retrieval@1", "plan_retrieval@5", "plan_gallery"}
    by_task = {"plan_cosine_t2i", "plan_cosine_v2v"}
    assert rows[0].keys() - plain[0].keys() == {f"val/{name}" for name in quality | by_task}
    assert rows[1]["val/plan_gallery"] <= 3 and 0 <= rows[1]["val/plan_retrieval@1"] <= 1
    assert rows[0]["val/plan_cosine"] != rows[1]["val/plan_cosine"]  # the average has moved on
    assert {"val/answers", "val/accuracy"} <= plain[0].keys()


def test_the_first_samples_with_a_target_are_planned() -> None:
    meter = PlanMeter(3, 32, CPU)
    samples = make_planner_samples()
    padding = Conversation("t2i", samples[2].messages, "again", info={"padding": True})
    chosen = [meter.choose(batch) for batch in ([padding, *samples], samples, samples)]
    assert [[s.task for s in some] for some in chosen] == [["v2v", "t2i"], ["v2v"], []]
    with pytest.raises(ConfigError, match="at least 0"):
        PlanValidation(-1)


def test_plans_are_measured_against_the_true_embeddings() -> None:
    module = make_planner(planning=PlanningConfig(steps=2, flow_steps=2))
    samples = [make_item(task, n, **SIZE) for n in range(4) for task in ("t2i", "v2v")]
    visuals = [true_target(sample, module.template.vision) for sample in samples]
    with torch.no_grad():
        true = module.planner.see(visuals)
    perfect, wrong = PlanMeter(8, 32, CPU), PlanMeter(8, 32, CPU)
    perfect.add(samples, true.split(4), visuals, true)
    wrong.add(samples, true.split(4)[2:] + true.split(4)[:2], visuals, true)
    found = {name: value.item() for name, value in perfect.compute(ALONE).items()}
    names = ("cosine", "cosine_t2i", "cosine_v2v", "explained_variance", "retrieval@1", "retrieval@5")
    assert found == {"plan_gallery": 8, **{f"plan_{name}": pytest.approx(1, abs=1e-4) for name in names}}
    assert wrong.compute(ALONE)["plan_retrieval@1"] == 0
    # All plans show the true patches, so the picture of a plan is the target; the other meter shows its neighbour's.
    pictures = list(perfect.pictures(8))
    assert [picture.key for picture in pictures] == [sample.key for sample in samples]
    for picture, other in zip(pictures, wrong.pictures(8), strict=True):
        assert picture.pixels.shape == (3, 1, 32 + 2 + 32, 32)
        frames, plan = picture.pixels[:, 0, :32], picture.pixels[:, 0, 34:]
        assert torch.equal(frames, plan) and torch.equal(frames, other.pixels[:, 0, :32])
    target = samples[0].targets[0].media
    assert target and target.pixels is not None and torch.equal(pictures[0].pixels[:, 0, :32], target.pixels[:, 0])
    assert not torch.equal(next(wrong.pictures(1)).pixels, pictures[0].pixels)


def test_without_plans_there_is_nothing_to_tell() -> None:
    meter = PlanMeter(8, 32, CPU)
    assert meter.compute(ALONE) == {} and list(meter.pictures(4)) == []
    nothing = Conversation("t2i", [m for m in make_item("t2i", 0, **SIZE).messages if not m.is_target])
    nothing.messages.append(type(nothing.messages[0])("image_gen"))
    with pytest.raises(DataError, match="without its true target"):
        true_target(nothing, make_planner().template.vision)


def test_an_answer_is_right_if_greedy_decoding_gives_it() -> None:
    module = make_planner()
    chats = [make_question("und_img", n, kinds=["background"], **SIZE) for n in range(6)]
    keys = [("test", n) for n in range(6)]
    optimizer = torch.optim.AdamW(module.trainable(), lr=3e-3)
    for _ in range(12):  # enough to learn some answers, not all
        optimizer.zero_grad()
        module.losses(chats, keys, train=False)[0].backward()
        optimizer.step()
    module.planner.eval()
    written = [module.template(chat) for chat in chats]
    labelled = [int((w.labels >= 0).sum()) for w in written]
    with torch.no_grad():
        right = right_tokens(module.planner(pack(written)), labelled)
        said = [greedy(module, w) for w in written]
    answers = [bool(own.all()) for own in right]
    assert answers == [ids == w.labels[w.labels >= 0].tolist() for ids, w in zip(said, written, strict=True)]
    assert 0 < sum(answers) < 6
    means = module.losses(chats, keys, train=False)[1].means()
    assert means["answers"].item() == pytest.approx(sum(answers) / 6)
    tokens = torch.cat(right).float().mean().item()
    assert means["accuracy"].item() == pytest.approx(tokens) and tokens > sum(answers) / 6


def greedy(module: PlannerModule, written: PlannerSample) -> list[int]:
    """What is said when each token is taken from the model's own words, one after the other."""
    places, ids = (written.labels >= 0).nonzero().squeeze(1), written.ids.clone()
    ids[places] = 0
    for number, place in enumerate(places):
        logits = module.planner(pack([replace(written, ids=ids)])).logits
        ids[place] = logits[number].argmax()
    return ids[places].tolist()

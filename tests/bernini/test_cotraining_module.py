"""Co-training by the command line: stages, exact resuming, several ranks, samples with plans, and what a fit leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cotrainings import EVERY, make_cotraining, make_cotraining_config, make_planner_folder
from factories import build, callback, fit, logged_rows
from planners import SIZE, make_planner

from bernini.cotraining.exposure import PlanExposure
from bernini.cotraining.module import CoTrainingModule
from bernini.cotraining.settings import CoTrainingLoss
from bernini.cotraining.stages import Stage
from bernini.errors import ConfigError
from bernini.planner.model import load_planner, save_planner
from bernini.renderer.experts import load_transformer
from datamodules.toyworld import make_item, make_question

STRATEGIES = {
    "ddp": callback("lightning.pytorch.strategies.DDPStrategy", process_group_backend="gloo"),
    "fsdp2": callback(
        "lightning.pytorch.strategies.ModelParallelStrategy",
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
    ),
    "ulysses": callback(
        "lightning.pytorch.strategies.ModelParallelStrategy",
        data_parallel_size=1,
        tensor_parallel_size=2,
        process_group_backend="gloo",
    ),
}
WARM_UP = [{"train": ["connector_gen"], "until": 2}, {"train": [part for part in EVERY if part != "vit"]}]
LATER = [  # parts come and go
    {"train": ["connector_gen", "renderer_high"], "until": 1},
    {"train": ["mllm", "flow_head"], "until": 2},
    {"train": ["connector_gen", "connector_vit", "mask_token", "mllm", "renderer_low"]},
]


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planner's folder."""
    return make_planner_folder(tmp_path_factory.mktemp("planner"))


def stored(run: Path) -> dict[str, Any]:
    """The last checkpoint, which is a file, or a folder when it is sharded."""
    path = run / "last.ckpt"
    return torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)


def groups(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups of the optimizer."""
    return checkpoint["optimizer_states"][0]["param_groups"]


def of_part(name: str) -> str:
    found = {".proj_gen.": "connector_gen", ".pred_vit.": "connector_vit", ".vit_decoder.": "flow_head"}
    found |= {".mask_tokens": "mask_token", ".visual.": "vit", ".mllm.": "mllm"}
    found |= {"renderer.transformer.": "renderer_high", "renderer.transformer_2.": "renderer_low"}
    return next(part for key, part in found.items() if key in name)


def test_a_run_resumed_at_every_step_is_the_unbroken_run(wan: Path, planner: Path, tmp_path: Path) -> None:
    def config(name: str) -> dict[str, Any]:
        more = {"stages": LATER, "exposure": {"visible": 0.4, "full": 0.2, "planned": 0.2, "noised": 0.2}}
        dropout = {"text": 0.3, "image": 0.3, "video": 0.3, "plan": 0.3}
        config = make_cotraining_config(wan, planner, tmp_path / name, 4, dropout=dropout, **more)
        config["model"]["init_args"] |= {
            "rates": {"connector_gen": 0.01},
            "lr_scheduler": callback("torch.optim.lr_scheduler.LinearLR", start_factor=0.1, total_iters=3),
        }
        config["trainer"] |= {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "limit_val_batches": 0}
        return config

    whole = fit(config("whole"))[0]["losses"]
    broken: list[float] = []
    states = []
    for step in range(1, 5):
        broken += fit(config("broken"), "--ckpt_path", "auto", "--trainer.max_steps", str(step))[0]["losses"]
        states.append(stored(tmp_path / "broken"))
    assert len(whole) == 8 and broken == whole
    first, second = (stored(tmp_path / name) for name in ("whole", "broken"))
    assert (
        [group.pop("name") for group in groups(first)]
        == [group.pop("name") for group in groups(second)]
        == ["connector_gen", "connector_vit", "flow_head", "mask_token", "mllm", "renderer_high", "renderer_low"]
    )
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=0)
    torch.testing.assert_close(second["callbacks"]["EMA"], first["callbacks"]["EMA"], rtol=0, atol=0)

    trained = [{"connector_gen", "renderer_high"}, {"mllm", "flow_head"}, *([{*LATER[2]["train"]}] * 2)]
    start = build(config("fresh"), tmp_path).state_dict()
    for state, expected in zip(states, trained, strict=True):
        weights = state["state_dict"]
        moved = {of_part(name) for name, x in weights.items() if not torch.equal(x, start[name])}
        assert moved == expected  # neither gradients nor weight decay reach the others
        start = weights
    rates = [group["lr"] for group in groups(first)]
    assert rates[0] == pytest.approx(0.01) and rates[1:] == [pytest.approx(0.003)] * 6


def test_losses_fall(wan: Path, planner: Path) -> None:
    module = make_cotraining(wan, planner, [part for part in EVERY if part != "vit"], loss=CoTrainingLoss())
    samples = [make_item("v2v", 0, **SIZE), make_question("und_img", 1, **SIZE), make_item("t2i", 2, **SIZE)]
    optimizer = torch.optim.AdamW(module.param_groups(), lr=3e-3)
    seen = []
    for step in range(40):
        loss, table = module.losses(samples, [("a", step, number) for number in range(3)], train=False)
        seen.append({name: value.item() for name, value in table.means().items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name in ("ntp", "visual", "dit"):
        first, last = (sum(row[name] for row in rows) for rows in (seen[:10], seen[-10:]))
        assert last < 0.9 * first, name


def test_the_loss_is_the_weighted_sum_of_both_experts_and_the_rest(wan: Path, planner: Path) -> None:
    weights = CoTrainingLoss(ntp=0.25, visual=2.0, dit=3.0)
    module = make_cotraining(wan, planner, EVERY, loss=weights)
    samples = [make_item("v2v", 0, **SIZE), make_question("und_img", 1, **SIZE)]
    loss, table = module.losses(samples, [("a",), ("b",)], train=False)
    means = table.means()
    expected = 0.25 * means["ntp"] + 2.0 * means["visual"] + 3.0 * 2 * means["dit"]  # a mean over both experts
    torch.testing.assert_close(loss, expected)


# -- several ranks ------------------------------------------------------------------------------------------------


def distributed(wan: Path, planner: Path, run: Path, batch_size: int) -> dict[str, Any]:
    config = make_cotraining_config(wan, planner, run, 4, stages=WARM_UP)
    config["data"]["init_args"] |= {"batch_size": batch_size, "val_length": 5}
    # Adam would turn the sign of a gradient of 1e-9 into a whole step.
    plain = callback("torch.optim.SGD", lr=0.02, momentum=0.9, weight_decay=0.1)
    config["model"]["init_args"]["optimizer"] = plain
    for name in ("SavePlanner", "SaveRenderer"):
        config["trainer"]["callbacks"].append(callback(f"callbacks.{name}", folder=str(run / "out")))
    return config


@pytest.fixture(scope="module")
def one_rank(wan: Path, planner: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Record and folder of four steps on one rank, two samples each, of which two are a warm-up."""
    root = tmp_path_factory.mktemp("one_rank")
    return fit(distributed(wan, planner, root, 2))[0], root


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_are_one_rank_across_a_stage(
    wan: Path, planner: Path, tmp_path: Path, one_rank: tuple[dict[str, Any], Path], strategy: str
) -> None:
    # A rank has either a question or a target, or a slice of both.
    config = distributed(wan, planner, tmp_path, 2 if strategy == "ulysses" else 1)
    config["trainer"] |= {"devices": 2, "strategy": STRATEGIES[strategy]}
    parts = [fit(config, "--trainer.max_steps=3", ranks=2), fit(config, "--ckpt_path", "auto", ranks=2)]
    losses = [[loss for part in parts for loss in part[rank]["losses"]] for rank in range(2)]
    record, root = one_rank
    mean = [(a + b) / 2 for a, b in zip(*losses, strict=True)]
    assert mean == pytest.approx(record["losses"], abs=1e-5)
    known = {k: v for k, v in record["metrics"][-1].items() if not (strategy != "ddp" and "plan_" in k)}
    assert "val/plan_cosine" in record["metrics"][-1] and "val/dit_v2v" in known
    assert [rank["metrics"][-1] for rank in parts[-1]] == [pytest.approx(known, rel=1e-4, abs=1e-5)] * 2
    written = [
        {
            **load_planner(folder / "out").state_dict(),
            **load_transformer(folder / "out", "high").state_dict(),
            **{f"low.{k}": v for k, v in load_transformer(folder / "out", "low").state_dict().items()},
        }
        for folder in (tmp_path, root)
    ]
    torch.testing.assert_close(written[0], written[1], rtol=0, atol=1e-6)


# -- what a fit shows and leaves ----------------------------------------------------------------------------------


def test_a_fit_shows_samples_and_plans_and_leaves_one_folder_to_start_from(
    wan: Path, planner: Path, tmp_path: Path
) -> None:
    config = make_cotraining_config(wan, planner, tmp_path, 2, validation={"samples": 2})
    toy = {"class_path": "benchmarks.quality.toy.ToyBenchmark"}
    toy["init_args"] = {"tasks": ["t2v"], "per_task": 1, "frames": 5, "size": 32}
    config["trainer"]["callbacks"] += [
        callback("callbacks.SampleVideos", folder=str(tmp_path / "samples"), every_n_steps=2, count=3),
        callback("callbacks.PlanPictures", folder=str(tmp_path / "plans")),
        callback("callbacks.SavePlanner", folder=str(tmp_path / "out")),
        callback("callbacks.SaveRenderer", folder=str(tmp_path / "out")),
        callback(
            "callbacks.BenchmarkCallback", benchmark=toy, folder=str(tmp_path / "bench"), every_n_steps=2, limit=1
        ),
    ]
    fit(config)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"bernini", "mllm", "transformer", "transformer_2"}
    shown = {p.suffix for p in (tmp_path / "samples" / "step-000002").iterdir()}
    assert shown == {".mp4", ".png"}
    assert list((tmp_path / "plans" / "step-000002").glob("*.png"))
    assert list((tmp_path / "bench" / "step-000002").rglob("*.mp4"))
    row = logged_rows(tmp_path, "val")[0]
    assert {"val/loss", "val/ntp", "val/visual_t2i", "val/dit_v2v", "val/plan_cosine"} <= row.keys()
    average = stored(tmp_path)["callbacks"]["EMA"]["average"]
    again = make_cotraining_config(wan, planner, tmp_path / "again", 2)
    again["model"]["init_args"]["init_from"] = dict.fromkeys(("planner", "renderer"), str(tmp_path / "out"))
    found = dict(build(again, tmp_path).named_parameters())
    assert found.keys() == average.keys() and all(torch.equal(found[name], value) for name, value in average.items())


def test_samples_are_those_of_their_seeds_and_plans_whatever_is_in_the_batch(wan: Path, planner: Path) -> None:
    module = make_cotraining(wan, planner, EVERY).eval()
    question, edit, image = (
        make_question("und_img", 1, **SIZE),
        make_item("v2v", 0, **SIZE),
        make_item("t2i", 2, **SIZE),
    )
    made = module.sample([question, edit, image], [5, 6, 7])
    assert [p.conversation.task for p in made] == ["v2v", "t2i"]
    assert [tuple(p.pixels.shape) for p in made] == [(3, 5, 32, 32), (3, 1, 32, 32)]
    (alone,) = module.sample([edit], [6])
    assert (alone.pixels.int() - made[0].pixels.int()).abs().max() <= 1
    other = module.sample([edit], [9])[0]
    assert not torch.equal(other.pixels, alone.pixels)
    with torch.no_grad():  # with a planner that says something else
        module.planner.connector.proj_gen[-1].bias += 3
    assert not torch.equal(module.sample([edit], [6])[0].pixels, alone.pixels)


def test_the_guidance_of_the_full_model_is_asked_for(wan: Path, planner: Path) -> None:
    module = make_cotraining(wan, planner, EVERY).eval()
    module.sampling.mode = "v2v"
    with pytest.raises(ConfigError, match="has no use for a plan"):
        module.sample([make_item("v2v", 0, **SIZE)])
    module.sampling.mode = None
    assert len(module.sample([make_item("v2v", 0, **SIZE), make_item("rv2v", 1, **SIZE)])) == 2


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"stages": []}, "stages that end at"),
        ({"stages": [Stage(["mllm"], until=3)]}, "the last one has no end"),
        ({"stages": [Stage(["mllm"]), Stage(["vit"])]}, "ends at a step of its own"),
        ({"stages": [Stage(["mllm"], 4), Stage(["vit"], 4), Stage(["mllm"])]}, "ends at a step of its own"),
        ({"stages": [Stage([])]}, "trains nothing"),
        ({"loss": CoTrainingLoss(visual=0.0)}, "nothing teaches connector_vit and flow_head"),
        ({"expert": "high", "stages": [Stage(["renderer_low"])]}, "no renderer_low to train"),
    ],
)
def test_stages_that_make_no_sense_are_refused(wan: Path, planner: Path, more: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        make_cotraining(wan, planner, EVERY, **more)


def test_rates_that_would_do_nothing_are_refused(wan: Path, planner: Path) -> None:
    module = make_cotraining(wan, planner, ["mllm"], rates={"flow_head": 0.1})
    with pytest.raises(ConfigError, match="flow_head has a learning rate, and no stage trains it"):
        module.configure_optimizers()

    def schedule(rates: Any) -> Any:
        return lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=3)

    stages = [Stage(["mllm", "flow_head"])]
    module = make_cotraining(wan, planner, [], stages=stages, rates={"mllm": 0.1}, lr_scheduler=schedule(0.2))
    with pytest.raises(ConfigError, match="overrules the learning rates"):
        module.configure_optimizers()
    own = [0.1 if group["name"] == "mllm" else 1e-5 for group in module.param_groups()]
    module.lr_scheduler = schedule(own)
    module.configure_optimizers()


def test_parts_that_do_not_fit_are_refused(wan: Path, tmp_path: Path) -> None:
    save_planner(make_planner().planner, tmp_path)
    with pytest.raises(ConfigError, match="do not fit") as error:
        make_cotraining(wan, tmp_path, EVERY)
    assert "rows of 20 channels" in str(error.value) and "takes 12" in str(error.value)


def test_a_sharded_planner_cannot_plan(wan: Path, planner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_cotraining(wan, planner, EVERY)
    monkeypatch.setattr(CoTrainingModule, "device_mesh", "mesh")
    with pytest.raises(ConfigError, match="cannot plan"):
        module.sample([make_item("v2v", 0, **SIZE)])
    with pytest.raises(ConfigError, match=r"cannot plan\n.*exposure.planned"):
        make_cotraining(wan, planner, EVERY, exposure=PlanExposure(visible=0.5, planned=0.5))


def test_a_sharded_run_is_told_what_it_goes_on_from(wan: Path, planner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_cotraining(wan, planner, EVERY)
    for name, value in (("device_mesh", "mesh"), ("global_step", 3)):
        monkeypatch.setattr(CoTrainingModule, name, value)
    with pytest.raises(ConfigError, match="without what its optimizer had gathered"):
        module.on_train_start()

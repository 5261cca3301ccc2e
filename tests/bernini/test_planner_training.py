"""Planner training at scale: LoRA, several ranks, and the released folder that a fit leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import callback, fit, logged_rows
from planners import ADDED, SIZE, make_planner, make_planner_config, make_planner_samples

from bernini.conversation import Conversation, Message
from bernini.errors import CheckpointError, ConfigError
from bernini.planner.lora import LoRAConfig
from bernini.planner.model import load_planner
from datamodules.toyworld import make_item, make_question

STRATEGIES = {
    "ddp": callback("lightning.pytorch.strategies.DDPStrategy", process_group_backend="gloo"),
    "fsdp2": callback(
        "lightning.pytorch.strategies.ModelParallelStrategy",
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
    ),
}
KEYS = [("test", number) for number in range(3)]
FROZEN = (".visual.", ".proj_gen.")


def saving(run: Path, steps: int, **model: Any) -> dict[str, Any]:
    config = make_planner_config(run, steps, **model)
    config["trainer"]["callbacks"].append(callback("callbacks.SavePlanner", folder=str(run / "out")))
    return config


def stored(run: Path) -> dict[str, Any]:
    """The last checkpoint, which is a file, or a folder when it is sharded."""
    path = run / "last.ckpt"
    return torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)


def test_a_fit_leaves_the_average_as_a_folder_to_start_from(tmp_path: Path) -> None:
    fit(saving(tmp_path, 4))
    average = stored(tmp_path)["callbacks"]["EMA"]["average"]
    again = make_planner(init_from=str(tmp_path / "out"), tokenizer=str(tmp_path / "out" / "mllm"))
    written = dict(again.named_parameters())
    assert written.keys() - average.keys() == {name for name in written if any(part in name for part in FROZEN)}
    for name, value in average.items():
        assert torch.equal(written[name], value)
    fresh = make_planner()
    assert all(torch.equal(written[name], x) for name, x in fresh.named_parameters() if name not in average)
    text = "make the red ball blue"
    assert again.template.tokenizer.encode(text) == fresh.template.tokenizer.encode(text)


def test_lora_trains_resumes_and_is_folded_into_what_is_saved(tmp_path: Path) -> None:
    lora = {"rank": 2, "alpha": 6, "dropout": 0.2}
    fit(saving(tmp_path / "whole", 8, lora=lora))
    fit(saving(tmp_path / "broken", 4, lora=lora))
    fit(saving(tmp_path / "broken", 8, lora=lora), "--ckpt_path", "auto")
    whole, broken = (stored(tmp_path / name)["state_dict"] for name in ("whole", "broken"))
    assert whole.keys() == broken.keys() and all(torch.equal(whole[name], broken[name]) for name in whole)

    module = make_planner(lora=LoRAConfig(**{**lora, "dropout": 0.0}))
    before = {name: x.clone() for name, x in module.state_dict().items()}
    full = {name for name in before if name.startswith(("planner.vit_decoder.", "planner.connector.pred_vit."))}
    assert {name for name in whole if "lora_" not in name} == full | {"planner.mask_tokens"}
    assert len(whole.keys() - full) - 1 == 2 * 7 * 3  # two factors of seven layers in each of three blocks
    assert all(".language_model.layers." in name for name in whole if "lora_" in name)
    assert any(not torch.equal(whole[name], before[name]) for name in whole if "lora_B" in name)

    module.load_state_dict(stored(tmp_path / "whole")["callbacks"]["EMA"]["average"], strict=False)
    folded = make_planner(init_from=str(tmp_path / "whole" / "out"))
    folded.planner.vit_decoder.config.batch_mul = ADDED["batch_mul"]  # no weight tells it
    losses = [one.losses(make_planner_samples(), KEYS, train=False)[0] for one in (module, folded)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    plain = {name: x for name, x in folded.state_dict().items() if name.startswith("planner.mllm.")}
    base = {name.replace(".base_layer.", "."): x for name, x in before.items() if "lora_" not in name}
    moved = {name for name, x in plain.items() if not torch.equal(x, base[name])}
    assert moved == {name.replace(".base_layer.", ".") for name in before if name.endswith(".base_layer.weight")}


def test_lora_refuses_what_it_is_not_of() -> None:
    module = make_planner(lora=LoRAConfig(rank=2, targets=["q_proj"]))
    with pytest.raises(CheckpointError, match="does not fit the LoRA"):
        module.on_load_checkpoint({"state_dict": make_planner(lora=LoRAConfig(rank=2)).state_dict()})
    with pytest.raises(ConfigError, match="fits no layer"):
        make_planner(lora=LoRAConfig(targets=["to_q"]))


@pytest.mark.parametrize("task", ["t2i", "und_img", "und_txt"])
def test_every_trained_parameter_has_a_gradient_whatever_the_samples(task: str) -> None:
    chat = Conversation("und_txt", [Message("text", text="how are you?"), Message("text", text="fine", has_loss=True)])
    made = {"t2i": make_item("t2i", 0, **SIZE), "und_img": make_question("und_img", 0, **SIZE), "und_txt": chat}
    module = make_planner(train_vit=True)
    loss, _ = module.losses([made[task]], KEYS[:1], train=False)
    loss.backward()
    assert loss.item() > 0
    assert [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None] == []
    seen = any(p.grad.any() for p in module.planner.tower.parameters())
    drawn = any(p.grad.any() for p in module.planner.vit_decoder.parameters())
    assert (seen, drawn) == {"t2i": (False, True), "und_img": (True, False), "und_txt": (False, False)}[task]


# -- several ranks ------------------------------------------------------------------------------------------------


def distributed(run: Path, batch_size: int, **model: Any) -> dict[str, Any]:
    # Steps in proportion to the gradient: Adam would make large ones of what rounding leaves of gradients near zero.
    plain = callback("torch.optim.SGD", lr=0.02, momentum=0.9, weight_decay=0.1)
    config = saving(run, 4, optimizer=plain, **model)
    config["data"]["init_args"] |= {"batch_size": batch_size, "val_length": 5}
    return config


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Record and folder of four steps on one rank, two samples each."""
    root = tmp_path_factory.mktemp("one_rank")
    return fit(distributed(root, 2))[0], root


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_are_one_rank(tmp_path: Path, one_rank: tuple[dict[str, Any], Path], strategy: str) -> None:
    config = distributed(tmp_path, 1)  # a rank has either a question or a target
    config["trainer"] |= {"devices": 2, "strategy": STRATEGIES[strategy]}
    both = fit(config, ranks=2)
    record, root = one_rank
    mean = [(a + b) / 2 for a, b in zip(*(rank["losses"] for rank in both), strict=True)]
    assert mean == pytest.approx(record["losses"], abs=1e-5)
    sharded = strategy == "fsdp2"  # a sharded planner cannot plan
    known = {k: v for k, v in record["metrics"][-1].items() if not (sharded and "plan_" in k)}
    assert "val/plan_cosine" in record["metrics"][-1]
    assert [rank["metrics"][-1] for rank in both] == [pytest.approx(known, rel=1e-4, abs=1e-5)] * 2
    assert logged_rows(tmp_path) == [pytest.approx(row, abs=1e-5) for row in logged_rows(root)]
    averages = [stored(folder)["callbacks"]["EMA"]["average"] for folder in (tmp_path, root)]
    torch.testing.assert_close(averages[0], averages[1], rtol=0, atol=2e-5)
    written = [load_planner(folder / "out").state_dict() for folder in (tmp_path, root)]
    torch.testing.assert_close(written[0], written[1], rtol=0, atol=2e-5)


def test_a_sharded_lora_is_folded_too(tmp_path: Path) -> None:
    folded = []
    for name, ranks in (("one", 1), ("two", 2)):
        config = distributed(tmp_path / name, 2 // ranks, lora={"rank": 2})
        config["trainer"] |= {"max_steps": 2}
        if ranks == 2:
            config["trainer"] |= {"devices": 2, "strategy": STRATEGIES["fsdp2"]}
        fit(config, ranks=ranks)
        folded.append(load_planner(tmp_path / name / "out").state_dict())
    torch.testing.assert_close(folded[1], folded[0], rtol=0, atol=1e-5)

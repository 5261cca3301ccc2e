"""Planner training by the command line: losses that fall, exact resuming, what is learned and what stays."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import logged_rows

from bernini.cli import main
from bernini.conversation import Conversation
from bernini.planner.model import PlannerConfig
from bernini.planner.module import LossConfig, MLLMConfig, PlannerModule
from bernini.planner.planning import PlanningConfig
from bernini.planner.vision import VisionConfig
from datamodules.toyworld import make_item, make_question

ROOT = Path(__file__).parents[2]
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 700,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    "bos_token_id": 0,
    "eos_token_id": 2,
}
TOWER = {
    "out_hidden_size": 32,
    "hidden_size": 16,
    "depth": 2,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 8,
    "window_size": 32,
    "fullatt_block_indexes": [1],
}
CONFIG = """
model:
  class_path: bernini.planner.module.PlannerModule
  init_args:
    tokenizer: {root}/assets/toy/mllm
    mllm:
      text: {text}
      vision: {tower}
    planner: {{flow_width: 24, flow_depth: 2, batch_mul: 4, gen_dim: 20, mask_tokens: 3}}
    vision: {{patch: 8, min_pixels: 256, max_pixels: 4096, fps: 8.0}}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 3.0e-3}}}}
data:
  class_path: datamodules.toyworld.data.ToyWorldDataModule
  init_args:
    tasks: {{t2i: 1, v2v: 1, und_img: 1}}
    frames: 5
    height: 32
    width: 32
    batch_size: 6
    length: 600
    val_length: 6
trainer:
  max_steps: {steps}
  accelerator: cpu
  devices: 1
  logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {out}}}}}
  log_every_n_steps: 2
  enable_progress_bar: false
  enable_model_summary: false
  use_distributed_sampler: false
  check_val_every_n_epoch: null
  val_check_interval: 4
  default_root_dir: {out}
  callbacks:
    - class_path: callbacks.EMA
      init_args: {{decay: 0.9}}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {out}/checkpoints, save_last: true, save_top_k: 0, every_n_train_steps: 4}}
"""


def fit(folder: Path, steps: int, *more: str) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG.format(root=ROOT, out=folder, steps=steps, text=TEXT, tower=TOWER))
    assert main(["fit", "-c", str(folder / "config.yaml"), *more]) == 0
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def make_module(**more) -> PlannerModule:
    module = PlannerModule(
        tokenizer=str(ROOT / "assets" / "toy" / "mllm"),
        mllm=MLLMConfig(TEXT, TOWER),
        planner=PlannerConfig(flow_width=24, flow_depth=2, batch_mul=4, gen_dim=20, mask_tokens=3),
        vision=VisionConfig(patch=8, min_pixels=256, max_pixels=4096, fps=8.0),
        **more,
    )
    module.configure_model()
    return module


def make_samples() -> list[Conversation]:
    size = {"frames": 5, "height": 32, "width": 32}
    return [make_item("v2v", 0, **size), make_question("und_vid", 1, **size), make_item("t2i", 2, **size)]


KEYS = [("test", number) for number in range(3)]


def test_a_resumed_fit_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 8)
    start = fit(tmp_path / "broken", 4)
    resumed = fit(tmp_path / "broken", 8, "--ckpt_path", "auto")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    changed = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert any(name.startswith("planner.vit_decoder") for name in changed) and "planner.mask_tokens" in changed
    assert not any(".visual." in name or ".proj_gen." in name for name in changed)
    rows = logged_rows(tmp_path / "whole")
    names = {"loss", "visual", "visual_t2i", "visual_v2v", "ntp", "accuracy"}
    assert [row["step"] for row in rows] == [1, 3, 5, 7]
    assert all(row.keys() == {"step", *(f"train/{name}" for name in names)} for row in rows)
    assert logged_rows(tmp_path / "broken")[-1] == pytest.approx(rows[-1])
    assert [row["step"] for row in logged_rows(tmp_path / "whole", "val")] == [3, 7]


def test_losses_fall() -> None:
    module, samples = make_module(), make_samples()
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
    module, samples = make_module(loss=LossConfig(ntp=0.25, visual=2.0)), make_samples()
    loss, table = module.losses(samples, KEYS, train=False)
    means = table.means()
    torch.testing.assert_close(loss, 0.25 * means["ntp"] + 2.0 * means["visual"])
    chat, _ = module.losses(samples[1:2], KEYS[1:2], train=False)
    torch.testing.assert_close(chat, 0.25 * means["ntp"])  # it saw nothing of its neighbours


def test_padding_is_not_measured() -> None:
    module, samples = make_module(), make_samples()
    measured = module.losses(samples[:2], KEYS[:2], train=False)[1].means()
    padding = replace(samples[2], info={"padding": True})
    padded = module.losses([*samples[:2], padding], KEYS, train=False)[1].means()
    assert padded.keys() == measured.keys() and "visual_t2i" not in padded
    torch.testing.assert_close(padded["ntp"], measured["ntp"])


def test_plans_are_of_the_target_and_leave_the_training_mode() -> None:
    module = make_module(planning=PlanningConfig(steps=2, flow_steps=2))
    video, _, image = make_samples()
    plans = module.plan([video, image], seeds=[1, 2])
    assert [plan.embeds.shape for plan in plans] == [(4, 32), (4, 32)]  # the clip gives one pair of frames
    assert module.planner.training
    (alone,) = module.plan([image], seeds=[2])
    torch.testing.assert_close(alone.embeds, plans[1].embeds)

"""What tests of planner training share: a tiny planner, samples of the toy world, and runs over them."""

from pathlib import Path
from typing import Any

import torch
from factories import callback, keep_checkpoints, log_to_csv

from bernini.conversation import Conversation
from bernini.planner.conversations import write_planner
from bernini.planner.model import PlannerConfig
from bernini.planner.module import MLLMConfig, PlannerModule
from bernini.planner.vision import VisionConfig
from datamodules.toyworld import make_item, make_question

TOKENIZER = str(Path(__file__).parents[1] / "assets" / "toy" / "mllm")
SIZE = {"frames": 5, "height": 32, "width": 32}
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
ADDED = {"flow_width": 24, "flow_depth": 2, "batch_mul": 4, "gen_dim": 20, "mask_tokens": 3}
VISION = {"patch": 8, "min_pixels": 256, "max_pixels": 4096, "fps": 8.0}


def make_planner(**more: Any) -> PlannerModule:
    """A tiny planner module with its weights, outside of a run."""
    given = {"tokenizer": TOKENIZER, "vision": VisionConfig(**VISION), **more}
    if "init_from" not in given:
        given = {"mllm": MLLMConfig(TEXT, TOWER), "planner": PlannerConfig(**ADDED), **given}
    module = PlannerModule(**given)
    module.configure_model()
    return module


def make_planner_config(run: Path, steps: int, **model: Any) -> dict[str, Any]:
    """Configuration of a run with an average, checkpoints and logs; ``model`` goes over the planner's ``init_args``."""
    config: dict[str, Any] = {
        "model": {
            "class_path": "bernini.planner.module.PlannerModule",
            "init_args": {
                "tokenizer": TOKENIZER,
                "mllm": {"text": TEXT, "vision": TOWER},
                "planner": ADDED,
                "vision": VISION,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
                **model,
            },
        },
        "data": {
            "class_path": "datamodules.toyworld.data.ToyWorldDataModule",
            "init_args": {
                "tasks": {"t2i": 1, "v2v": 1, "und_img": 1},
                **SIZE,
                "batch_size": 6,
                "length": 600,
                "val_length": 6,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "val_check_interval": 4,
            "default_root_dir": str(run),
            "callbacks": [callback("callbacks.EMA", decay=0.9)],
        },
    }
    keep_checkpoints(config, run, every=4)
    log_to_csv(config, run, every=2)
    return config


def make_planner_samples() -> list[Conversation]:
    """An edit, a question and an image."""
    return [make_item("v2v", 0, **SIZE), make_question("und_vid", 1, **SIZE), make_item("t2i", 2, **SIZE)]


def write_planner_folder(folder: Path, gen_dim: int = ADDED["gen_dim"]) -> Path:
    """The folder of a tiny random planner, for a renderer whose text features are so wide."""
    module = make_planner(planner=PlannerConfig(**{**ADDED, "gen_dim": gen_dim}))
    torch.nn.init.normal_(module.planner.connector.proj_gen[-1].weight, generator=torch.Generator().manual_seed(0))
    write_planner(module.planner, module.template, folder)
    return folder

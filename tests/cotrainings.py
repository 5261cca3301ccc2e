"""What tests of co-training share: a tiny planner and a tiny renderer that fit, as folders, a module and runs."""

from pathlib import Path
from typing import Any

import torch
from factories import EDGE, FRAMES, callback, keep_checkpoints, log_to_csv
from planners import ADDED, SIZE, TOKENIZER, VISION, make_planner

from bernini.cotraining.module import CoTrainingModule
from bernini.cotraining.settings import InitFrom
from bernini.cotraining.stages import Stage
from bernini.planner.model import PlannerConfig, save_planner
from bernini.planner.planning import PlanningConfig
from bernini.planner.vision import VisionConfig
from bernini.renderer.frozen import TextConfig
from bernini.renderer.sampling import SamplingConfig

WIDTH = 12  # of the text features of `factories.make_wan_folder`
EVERY = ["connector_gen", "connector_vit", "flow_head", "mask_token", "mllm", "vit", "renderer"]
NO_DROPOUT = {"text": 0.0, "image": 0.0, "video": 0.0, "plan": 0.0}
SAMPLING = {"steps": 2, "frames": FRAMES, "height": EDGE, "width": EDGE, "mode": "vae_txt_vit"}


def make_planner_folder(folder: Path) -> Path:
    """A tiny planner without the zeros that connector and flow head start with, behind which nothing has a gradient."""
    planner = make_planner(planner=PlannerConfig(**{**ADDED, "gen_dim": WIDTH})).planner
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for p in (*planner.connector.proj_gen.parameters(), *planner.vit_decoder.parameters()):
            p.data += 0.1 * torch.randn_like(p)
    save_planner(planner, folder)
    return folder


def make_cotraining(
    wan: Path, planner: Path, train: list[Any], kind: type[CoTrainingModule] = CoTrainingModule, **more: Any
) -> CoTrainingModule:
    """A module with its weights, outside of a run, in a stage that trains some parts."""
    given = {
        "expert": "both",
        "stages": [Stage(train)],
        "planner": PlannerConfig(batch_mul=4),
        "vision": VisionConfig(**VISION),
        "text": TextConfig(str(wan), rows=16),
        "planning": PlanningConfig(steps=2, flow_steps=1),
        "sampling": SamplingConfig(**SAMPLING),
        "recompute": "none",
    }
    module = kind(TOKENIZER, str(wan), InitFrom(str(planner), str(wan)), **{**given, **more})
    module.configure_model()
    return module


def make_cotraining_config(wan: Path, planner: Path, run: Path, steps: int, **model: Any) -> dict[str, Any]:
    """Configuration of a run with an average, checkpoints and logs; ``model`` goes over the ``init_args``."""
    config: dict[str, Any] = {
        "model": {
            "class_path": "bernini.cotraining.module.CoTrainingModule",
            "init_args": {
                "tokenizer": TOKENIZER,
                "vae": str(wan),
                "init_from": {"planner": str(planner), "renderer": str(wan)},
                "expert": "both",
                "stages": [{"train": EVERY}],
                "planner": {"batch_mul": 4},
                "vision": VISION,
                "text": {"encoder": str(wan), "rows": 16},
                "planning": {"steps": 2, "flow_steps": 1},
                "sampling": SAMPLING,
                "recompute": "none",
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
                **model,
            },
        },
        "data": {
            "class_path": "datamodules.toyworld.data.ToyWorldDataModule",
            "init_args": {
                "tasks": {"t2i": 1, "v2v": 1, "und_img": 1},
                **SIZE,
                "batch_size": 4,
                "length": 600,
                "val_length": 4,
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
            "val_check_interval": steps,
            "default_root_dir": str(run),
            "callbacks": [callback("callbacks.EMA", decay=0.9)],
        },
    }
    keep_checkpoints(config, run, every=1)
    log_to_csv(config, run, every=1)
    return config

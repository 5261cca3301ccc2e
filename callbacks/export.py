"""Weights that other tools load, written when training ends."""

from abc import abstractmethod
from pathlib import Path
from typing import Literal

import lightning as L
import torch

from bernini.cotraining.module import CoTrainingModule
from bernini.planner.conversations import write_planner
from bernini.planner.module import PlannerModule
from bernini.renderer.lora import save_lora
from bernini.renderer.module import RendererModule
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.sharding import gather
from callbacks.ema import best_weights


class SaveWeights(L.Callback):
    """Writes trained weights when a fit ends: the moving average where the run keeps one, else the live ones.

    Args:
        folder: Where to.
        dtype: Dtype of the written weights.
    """

    def __init__(self, folder: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> None:
        self.folder, self.dtype = Path(folder), getattr(torch, dtype)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the weights."""
        with best_weights(trainer, pl_module):
            self.save(pl_module, write=trainer.is_global_zero)

    @abstractmethod
    def save(self, module: L.LightningModule, write: bool) -> None:
        """Write what the module holds; every rank calls, and one of them writes."""


class SaveRenderer(SaveWeights):
    """Writes the trained renderer as a diffusers folder: ``transformer/`` and ``transformer_2/``, or LoRA files.

    The weights are the moving average where the run keeps one.

    Args:
        folder: Where to; an expert that this run did not train is left as it is there.
        dtype: Dtype of the written weights; LoRA files are always float32.
    """

    def save(self, module: L.LightningModule, write: bool) -> None:
        """Write each expert that was trained."""
        assert isinstance(module, RendererModule | CoTrainingModule)
        if isinstance(module, RendererModule) and module.lora:
            save_lora(module.renderer, self.folder, write)
            return
        for name, model in module.renderer.models.items():
            whole = gather(model)
            if write:
                with torch.device("meta"):
                    plain = PackedWanTransformer3DModel.from_config(model.config)
                plain.load_state_dict({k: v.to(self.dtype) for k, v in whole.items()}, assign=True)
                plain.save_pretrained(self.folder / name)


class SavePlanner(SaveWeights):
    """Writes the trained planner as the released folder has it: ``bernini/``, and ``mllm/`` with the tokenizer.

    The weights are the moving average where the run keeps one. A LoRA is folded into them.

    Args:
        folder: Where to; it is what ``init_from`` and ``tokenizer`` (with ``mllm/``) of a planner take.
        dtype: Dtype of the written weights.
    """

    def save(self, module: L.LightningModule, write: bool) -> None:
        """Write the planner, its configuration, settings and tokenizer."""
        assert isinstance(module, PlannerModule | CoTrainingModule)
        write_planner(module.planner, module.template, self.folder, self.dtype, write)

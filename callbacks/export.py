"""Weights that other tools load, written when training ends."""

from pathlib import Path
from typing import Literal

import lightning as L
import torch

from bernini.renderer.lora import save_lora
from bernini.renderer.module import RendererModule
from bernini.renderer.sharding import gather
from bernini.renderer.transformer import PackedWanTransformer3DModel
from callbacks.ema import best_weights


class SaveRenderer(L.Callback):
    """Writes the trained renderer as a diffusers folder: ``transformer/`` and ``transformer_2/``, or LoRA files.

    The weights are the moving average where the run keeps one.

    Args:
        folder: Where to; an expert that this run did not train is left as it is there.
        dtype: Dtype of the written weights; LoRA files are always float32.
    """

    def __init__(self, folder: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> None:
        self.folder, self.dtype = Path(folder), getattr(torch, dtype)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the weights."""
        assert isinstance(pl_module, RendererModule)
        with best_weights(trainer, pl_module):
            if pl_module.lora:
                save_lora(pl_module.renderer, self.folder, write=trainer.is_global_zero)
                return
            for name, model in pl_module.renderer.models.items():
                whole = gather(model)
                if trainer.is_global_zero:
                    with torch.device("meta"):
                        plain = PackedWanTransformer3DModel.from_config(model.config)
                    plain.load_state_dict({k: v.to(self.dtype) for k, v in whole.items()}, assign=True)
                    plain.save_pretrained(self.folder / name)

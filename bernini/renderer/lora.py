"""LoRA of the renderer, through PEFT and diffusers."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from bernini.errors import CheckpointError, ConfigError
from bernini.renderer.experts import Experts
from bernini.renderer.transformer import PackedWanTransformer3DModel

ADAPTER = "default"
FILE = "pytorch_lora_weights.safetensors"


@dataclass
class LoRAConfig:
    """Which layers get low-rank updates.

    Attributes:
        rank: Rank of the updates.
        alpha: Their scale times the rank; equal to the rank if null.
        dropout: Dropout before the down projection.
        targets: Names, or ends of names, of the linear layers.
        init_from: Folder with LoRA weights to start from.
    """

    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    )
    init_from: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank is {self.rank}", why="a rank is at least 1")


def add_lora(model: PackedWanTransformer3DModel, config: LoRAConfig) -> None:
    """Freeze a transformer and give it a trainable adapter.

    Raises:
        ConfigError: No layer bears one of the names.
    """
    from peft import LoraConfig

    model.requires_grad_(False)
    adapter = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,
        lora_dropout=config.dropout,
        target_modules=config.targets,
        init_lora_weights="gaussian",
    )
    try:
        model.add_adapter(adapter, adapter_name=ADAPTER)
    except ValueError as error:
        raise ConfigError("the LoRA fits no layer", where="lora.targets", why=str(error).splitlines()[0]) from error
    for parameter in trainable(model):
        parameter.data = parameter.data.float()


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that are learned."""
    return [p for p in module.parameters() if p.requires_grad]


def save_lora(experts: Experts, folder: str | Path) -> Path:
    """Write the adapters as one file that ``WanPipeline.load_lora_weights`` reads.

    Returns:
        The file.
    """
    from diffusers import WanPipeline
    from peft import get_peft_model_state_dict

    layers = {
        f"{name}_lora_layers": {
            k: v.float().cpu() for k, v in get_peft_model_state_dict(model, adapter_name=ADAPTER).items()
        }
        for name, model in experts.named_children()
        if getattr(model, "peft_config", None)
    }
    WanPipeline.save_lora_weights(folder, **layers, safe_serialization=True)
    return Path(folder) / FILE


def load_lora(experts: Experts, folder: str | Path) -> None:
    """Read adapters written by :func:`save_lora` into adapters of the same rank.

    Raises:
        CheckpointError: The file is missing, or it fits another rank or other layers.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    path = Path(folder) / FILE if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise CheckpointError("no LoRA weights here", where=str(path), fix="point lora.init_from at a saved LoRA")
    stored = load_file(path)
    for name, model in experts.named_children():
        own = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")}
        try:
            result = set_peft_model_state_dict(model, own, adapter_name=ADAPTER)
        except RuntimeError as error:
            raise CheckpointError(
                "the LoRA does not fit", where=str(path), why=str(error).splitlines()[0], fix="use its rank and layers"
            ) from error
        missing = [k for k in result.missing_keys if "lora_" in k]
        if missing or result.unexpected_keys:
            raise CheckpointError(
                f"the LoRA does not fit {name}",
                where=str(path),
                why=f"{len(missing)} layers are not in the file, {len(result.unexpected_keys)} of its layers are unknown",
            )


@torch.no_grad()
def merge_lora(model: PackedWanTransformer3DModel) -> None:
    """Fold a transformer's adapter into its weights and take it off."""
    model.fuse_lora()
    model.unload_lora()

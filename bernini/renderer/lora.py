"""LoRA of the renderer, through PEFT and diffusers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from bernini.errors import CheckpointError, ConfigError
from bernini.renderer.experts import Experts
from bernini.renderer.sharding import gather
from bernini.renderer.transformer import PackedWanTransformer3DModel

ADAPTER = "default"
FILES = {"transformer": "pytorch_lora_weights.safetensors", "transformer_2": "pytorch_lora_weights_2.safetensors"}


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
    alpha: int | None = None
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


def save_lora(experts: Experts, folder: str | Path, write: bool = True) -> None:
    """Write each adapter as a file that ``WanPipeline.load_lora_weights`` reads.

    The low-noise expert's file is read with ``weight_name`` and ``load_into_transformer_2``, as diffusers has it.

    Args:
        experts: Transformers with adapters.
        folder: Where to.
        write: Whether this rank writes; with sharded weights every rank has to call.
    """
    from diffusers import WanPipeline
    from peft import get_peft_model_state_dict

    for name, model in experts.models.items():
        whole = gather(model)
        if write:
            layers = get_peft_model_state_dict(model, state_dict=whole, adapter_name=ADAPTER)
            config: Any = model.peft_config
            WanPipeline.save_lora_weights(
                folder,
                {k: v.float().contiguous() for k, v in layers.items()},
                weight_name=FILES[name],
                transformer_lora_adapter_metadata=config[ADAPTER].to_dict(),  # holds alpha
            )


def load_lora(experts: Experts, folder: str | Path) -> None:
    """Read adapters written by :func:`save_lora` into adapters of the same rank.

    Args:
        experts: Transformers with adapters.
        folder: Where the files lie; or a file, for a single transformer.

    Raises:
        CheckpointError: A file is missing, or it fits another rank or other layers.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    for name, model in experts.models.items():
        path = Path(folder) if Path(folder).is_file() else Path(folder) / FILES[name]
        own = _read_lora(path)
        model_state = {k: v.shape for k, v in get_peft_model_state_dict(model, adapter_name=ADAPTER).items()}
        shapes = {k: v.shape for k, v in own.items()}
        if wrong := sorted({k for k, _ in shapes.items() ^ model_state.items()}):
            raise CheckpointError(
                f"the LoRA does not fit {name}",
                where=str(path),
                why=f"{len(wrong)} tensors are not in both or have another shape, e.g. {wrong[0]}",
                fix="use the rank and the targets that it was trained with",
            )
        set_peft_model_state_dict(model, own, adapter_name=ADAPTER)


def _read_lora(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a LoRA file by their names in the transformer."""
    fix = "point lora.init_from at a folder that training wrote, or at a LoRA in diffusers' format"
    if not path.is_file():
        raise CheckpointError("no LoRA weights here", where=str(path), fix=fix)
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise CheckpointError("the LoRA cannot be read", where=str(path), why=str(error), fix=fix) from error
    return {k.removeprefix("transformer."): v for k, v in stored.items()}


@torch.no_grad()
def merge_lora(model: PackedWanTransformer3DModel) -> None:
    """Fold a transformer's adapter into its weights and take it off."""
    model.fuse_lora()
    model.unload_lora()

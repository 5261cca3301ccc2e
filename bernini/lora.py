"""LoRA through PEFT, for any model of diffusers or transformers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bernini.checkpoints.lora import LoRALayer
from bernini.errors import CheckpointError, ConfigError
from bernini.optimizing import ConfiguredOptimizer

ADAPTER = "default"


@dataclass
class AdapterConfig:
    """Which layers get low-rank updates.

    Attributes:
        rank: Rank of the updates.
        alpha: Their scale times the rank; equal to the rank if null.
        dropout: Dropout before the down projection.
        targets: Names, or ends of names, of the linear layers.
    """

    rank: int = 32
    alpha: int | None = None
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank is {self.rank}", why="a rank is at least 1")
        if self.alpha is not None and self.alpha < 1:
            raise ConfigError(f"lora.alpha is {self.alpha}", why="it is at least 1", fix="null, which is the rank")


class Adaptable(ConfiguredOptimizer):
    """A module that may train a LoRA, with which its checkpoints hold the trained tensors only.

    Args:
        lora: The LoRA, if any.
    """

    def __init__(self, lora: AdapterConfig | None) -> None:
        super().__init__()
        self.lora = lora
        self.strict_loading = lora is None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only trained tensors beside a LoRA."""
        if self.lora:
            names = self._trained_names()
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Look at a LoRA's names, which loading in part cannot do.

        Raises:
            CheckpointError: The checkpoint is not one of this LoRA.
        """
        differ = self._trained_names() ^ set(checkpoint.get("state_dict", self._trained_names()))
        if self.lora and differ:
            raise CheckpointError(
                "the checkpoint does not fit the LoRA",
                why=f"{len(differ)} tensors are only in one of them, e.g. {min(differ)}",
                fix="resume with the LoRA's own targets, or start from weights (init_from, lora.init_from)",
            )

    def _trained_names(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}


def add_lora(model: Any, config: AdapterConfig) -> None:
    """Freeze a model of diffusers or transformers and give it a trainable adapter.

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
    for layer in adapted(model).values():
        layer._cast_input_dtype = _cast_input


def _cast_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The input as a LoRA takes it. Autocast would turn PEFT's fp32 copy back, and keep that beside the input."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that are learned."""
    return [p for p in module.parameters() if p.requires_grad]


def ignore_frozen_in_ddp(module: nn.Module) -> None:
    """Have DDP leave alone what is not trained: it may be anywhere, and of dtypes that it cannot send."""
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)


def adapted(model: nn.Module) -> dict[str, Any]:
    """Layers with an adapter, by their names."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def take_updates(model: nn.Module, whole: dict[str, Tensor]) -> dict[str, LoRALayer]:
    """Take a model's adapters out of its whole tensors, which keep the names that they have without.

    Args:
        model: The model.
        whole: Its tensors; adapters are removed, and the layers below them take their names.

    Returns:
        The updates by layer.
    """
    updates = {}
    for layer, module in adapted(model).items():
        down, up = (whole.pop(f"{layer}.{part}.{ADAPTER}.weight").float() for part in ("lora_A", "lora_B"))
        updates[layer] = LoRALayer(down, up, float(module.lora_alpha[ADAPTER]))
        for name in [name for name in whole if name.startswith(f"{layer}.base_layer.")]:
            whole[name.replace(".base_layer.", ".")] = whole.pop(name)
    return updates


@torch.no_grad()
def merge(whole: dict[str, Tensor], updates: dict[str, LoRALayer]) -> None:
    """Fold updates into the tensors of the layers that they belong to."""
    for layer, update in updates.items():
        weight = whole[f"{layer}.weight"]
        whole[f"{layer}.weight"] = (weight.float() + update.delta().view_as(weight)).to(weight.dtype)

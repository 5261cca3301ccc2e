"""LoRA of the renderer, through PEFT."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bernini.checkpoints.lora import EXPERTS, FILES, LoRA, LoRALayer, lora_files, read_lora, write_lora
from bernini.errors import CheckpointError, ConfigError
from bernini.flow.noise import Expert
from bernini.renderer.experts import Experts
from bernini.renderer.sharding import gather
from bernini.renderer.transformer import PackedWanTransformer3DModel

ADAPTER = "default"


@dataclass
class LoRAConfig:
    """Which layers get low-rank updates.

    Attributes:
        rank: Rank of the updates.
        alpha: Their scale times the rank; equal to the rank if null.
        dropout: Dropout before the down projection.
        targets: Names, or ends of names, of the linear layers.
        init_from: LoRA to start from: a folder or run that training wrote, or, for a single transformer, a file in the
            format of diffusers or ComfyUI. It does what it did there, whatever alpha is here.
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
        if self.alpha is not None and self.alpha < 1:
            raise ConfigError(f"lora.alpha is {self.alpha}", why="it is at least 1", fix="null, which is the rank")


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
    for name, model in experts.models.items():
        whole = gather(model)
        if write:
            layers = {}
            for layer, module in _adapted(model).items():
                down, up = (whole[f"{layer}.{part}.{ADAPTER}.weight"].float() for part in ("lora_A", "lora_B"))
                layers[layer] = LoRALayer(down, up, float(module.lora_alpha[ADAPTER]))
            expert: Expert = "single" if experts.boundary == 0 else EXPERTS[name]
            write_lora(Path(folder) / FILES[name], LoRA(layers, expert), "diffusers")


@torch.no_grad()
def load_lora(experts: Experts, source: str | Path) -> None:
    """Read LoRAs into adapters of the same rank and layers; their alphas may be others.

    Args:
        experts: Transformers with adapters.
        source: Folder that :func:`save_lora` wrote, or the run that holds it as ``model/``; or a file, for a single
            transformer.

    Raises:
        CheckpointError: A file is missing, or it fits another rank or other layers.
    """
    source = Path(source)
    files = dict.fromkeys(experts.models, source) if source.is_file() else lora_files(source)
    if experts.models.keys() - files.keys() or (source.is_file() and len(experts.models) > 1):
        raise CheckpointError(
            "each expert needs a LoRA of its own to start from",
            where=str(source),
            why=f"the model trains {' and '.join(experts.models)}",
            fix=f"give a folder with {' and '.join(FILES[n] for n in experts.models)}; `bernini export lora` makes it",
        )
    for name, model in experts.models.items():
        lora = read_lora(files[name])
        adapted = _adapted(model)
        if other := lora.layers.keys() ^ adapted.keys():
            raise lora.misfit(name, other, "are only in one of them", "use the lora.targets that it was trained with")
        for layer, module in adapted.items():
            down, up, read = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, lora.layers[layer]
            if (read.down.shape, read.up.shape) != (down.shape, up.shape):
                why = f"have another shape (rank {read.rank} there, {down.shape[0]} here)"
                raise lora.misfit(
                    name, [layer], why, f"set lora.rank to {read.rank}, and use the model that it was made for"
                )
            down.copy_(read.down)
            up.copy_(read.up * (read.scale / module.scaling[ADAPTER]))


def _adapted(model: PackedWanTransformer3DModel) -> dict[str, Any]:
    """Layers with an adapter, by their names."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def merge_lora(model: PackedWanTransformer3DModel) -> None:
    """Fold a transformer's adapter into its weights and take it off."""
    model.fuse_lora()
    model.unload_lora()

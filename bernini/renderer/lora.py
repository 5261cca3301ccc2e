"""LoRA of the renderer: its layers, and files that diffusers reads."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from bernini.checkpoints.lora import EXPERTS, FILES, LoRA, lora_files, read_lora, write_lora
from bernini.errors import CheckpointError
from bernini.flow.noise import Expert
from bernini.lora import ADAPTER, AdapterConfig, adapted, take_updates
from bernini.renderer.experts import Experts
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.sharding import gather


@dataclass
class LoRAConfig(AdapterConfig):
    """Which layers of the transformers get low-rank updates.

    Attributes:
        rank: Rank of the updates.
        alpha: Their scale times the rank; equal to the rank if null.
        dropout: Dropout before the down projection.
        targets: Names, or ends of names, of the linear layers.
        init_from: LoRA to start from: a folder or run that training wrote, or, for a single transformer, a file in the
            format of diffusers or ComfyUI. It does what it did there, whatever alpha is here.
    """

    targets: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    )
    init_from: str | None = None


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
            expert: Expert = "single" if experts.boundary == 0 else EXPERTS[name]
            write_lora(Path(folder) / FILES[name], LoRA(take_updates(model, whole), expert), "diffusers")


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
        layers = adapted(model)
        if other := lora.layers.keys() ^ layers.keys():
            raise lora.misfit(name, other, "are only in one of them", "use the lora.targets that it was trained with")
        for layer, module in layers.items():
            down, up, read = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, lora.layers[layer]
            if (read.down.shape, read.up.shape) != (down.shape, up.shape):
                why = f"have another shape (rank {read.rank} there, {down.shape[0]} here)"
                raise lora.misfit(
                    name, [layer], why, f"set lora.rank to {read.rank}, and use the model that it was made for"
                )
            down.copy_(read.down)
            up.copy_(read.up * (read.scale / module.scaling[ADAPTER]))


@torch.no_grad()
def merge_lora(model: PackedWanTransformer3DModel) -> None:
    """Fold a transformer's adapter into its weights and take it off."""
    model.fuse_lora()
    model.unload_lora()

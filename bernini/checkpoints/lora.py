"""LoRA files: diffusers' form and ComfyUI's, read and written without a model."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bernini.checkpoints.names import diffusers_name, original_name
from bernini.errors import CheckpointError
from bernini.files import replacing
from bernini.flow.noise import Expert

Form = Literal["diffusers", "comfyui"]
FILES = {"transformer": "pytorch_lora_weights.safetensors", "transformer_2": "pytorch_lora_weights_2.safetensors"}
EXPERTS: dict[str, Expert] = {"transformer": "high", "transformer_2": "low"}  # where there are two
EXPERT_KEY = "bernini_expert"  # of the file's header
PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")
KOHYA = "lora_unet_"
PARTS = {
    "lora_A.weight": "down",
    "lora_A.default.weight": "down",
    "lora_down.weight": "down",
    "lora_B.weight": "up",
    "lora_B.default.weight": "up",
    "lora_up.weight": "up",
    "alpha": "alpha",
}


@dataclass(frozen=True)
class LoRALayer:
    """The update of one layer's weight, ``alpha / rank * up @ down``.

    Attributes:
        down: ``[rank, in, ...]``.
        up: ``[out, rank, ...]``.
        alpha: Scale times rank.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What ``up @ down`` is multiplied with."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The update ``[out, in * ...]`` in fp32."""
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))


@dataclass(frozen=True)
class LoRA:
    """Updates of one transformer.

    Attributes:
        layers: Updates by diffusers' name of the layer, e.g. ``blocks.0.attn1.to_q``.
        expert: Which transformer they are for; ``None`` where the file does not say.
        where: The file that they come from, for errors.
    """

    layers: dict[str, LoRALayer]
    expert: Expert | None = None
    where: str = ""

    def misfit(self, model: str, layers: Iterable[str], why: str, fix: str) -> CheckpointError:
        """The error that some layers do not fit a model."""
        names = sorted(layers)
        why = f"{len(names)} layers {why}, e.g. {names[0]}"
        return CheckpointError(f"the LoRA does not fit {model}", where=self.where, why=why, fix=fix)


def lora_files(folder: Path) -> dict[str, Path]:
    """LoRA files in a folder, or in the ``model/`` where runs write them, by the names of their transformers.

    Raises:
        CheckpointError: There are none.
    """
    for place in (folder, folder / "model"):
        if found := {name: place / file for name, file in FILES.items() if (place / file).is_file()}:
            return found
    raise CheckpointError(
        "no LoRA weights here",
        where=str(folder),
        why=f"neither {' nor '.join(FILES.values())} is in it, or in its model/",
        fix="give a folder or a run that training wrote, or a single file",
    )


def read_lora(path: Path) -> LoRA:
    """Read a LoRA of a Wan text-to-video transformer.

    Diffusers' names (with ``transformer.``, or bare) and original names (with ``diffusion_model.``, bare, or with
    kohya's ``lora_unet_``) are understood. Alpha comes from ``.alpha`` tensors, else from diffusers' metadata, else it
    is the rank.

    Raises:
        CheckpointError: There is no such file, or it holds something else, or more, than a LoRA.
    """
    fix = "use a LoRA of a Wan text-to-video model, in the format of diffusers, PEFT, ComfyUI or musubi-tuner"
    if not path.is_file():
        raise CheckpointError("no LoRA weights here", where=str(path), fix=fix)
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        written = json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}")).items()
    except (SafetensorError, ValueError, AttributeError) as error:
        raise CheckpointError("the LoRA cannot be read", where=str(path), why=str(error), fix=fix) from error
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        layer, part = _split(key)
        if part is None or layer is None:
            raise CheckpointError("this is not a plain LoRA of a Wan transformer", where=f"{path}, {key}", fix=fix)
        parts.setdefault(layer, {})[part] = tensor
    if not parts:
        raise CheckpointError("the LoRA is empty", where=str(path), fix=fix)
    for layer, found in parts.items():
        if not {"down", "up"} <= found.keys() or found["down"].shape[0] != found["up"].shape[1]:
            shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in sorted(found.items()))
            raise CheckpointError("the LoRA's matrices do not fit each other", where=f"{path}, {layer}", why=shapes)
    config = {key.removeprefix("transformer."): value for key, value in written}
    layers = {name: _layer(name, found, config) for name, found in parts.items()}
    expert = cast(Expert | None, header.get(EXPERT_KEY))
    return LoRA(layers, expert if expert in get_args(Expert) else None, str(path))


def _split(key: str) -> tuple[str | None, str | None]:
    """Diffusers' name of a tensor's layer and what the tensor is to it."""
    name, part = next(
        ((key.removesuffix(f".{end}"), part) for end, part in PARTS.items() if key.endswith(f".{end}")), (key, None)
    )
    if name.startswith(KOHYA):
        return diffusers_name(name.removeprefix(KOHYA)), part
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return diffusers_name(name) or name, part


def _layer(name: str, found: dict[str, Tensor], config: dict[str, Any]) -> LoRALayer:
    rank = found["down"].shape[0]
    if "alpha" in found:
        alpha = found["alpha"].item()
    else:
        patterns = config.get("alpha_pattern") or {}
        own = (value for end, value in patterns.items() if f".{name}".endswith(f".{end}"))
        alpha = next(own, config.get("lora_alpha", rank))
        if config.get("use_rslora"):
            alpha *= math.sqrt(rank)  # PEFT then scales by alpha / sqrt(rank)
    return LoRALayer(found["down"], found["up"], float(alpha))


def write_lora(path: Path, lora: LoRA, form: Form, dtype: torch.dtype | None = None) -> None:
    """Write a LoRA, tensors as they are or in another dtype; :func:`read_lora` gives the same back.

    Args:
        path: The file.
        lora: What to write.
        form: ``diffusers`` has alpha in the file's metadata, as ``WanPipeline.load_lora_weights`` wants; ``comfyui``
            has original names and alpha as tensors.
        dtype: Dtype of the matrices; as they are if not given.

    Raises:
        CheckpointError: ComfyUI's Wan has no layer of that name.
    """
    header = {"format": "pt"} | ({EXPERT_KEY: lora.expert} if lora.expert else {})
    tensors: dict[str, Tensor] = {}
    for name, layer in lora.layers.items():
        down, up = (t.to(dtype or t.dtype).contiguous() for t in (layer.down, layer.up))
        if form == "diffusers":
            tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
            continue
        original = original_name(name)
        if original is None:
            raise CheckpointError("ComfyUI knows no such layer", where=name, why="it is not one of Wan's text-to-video")
        place = f"diffusion_model.{original}"
        tensors |= {f"{place}.lora_down.weight": down, f"{place}.lora_up.weight": up}
        tensors[f"{place}.alpha"] = torch.tensor(layer.alpha)
    if form == "diffusers":
        header[LORA_ADAPTER_METADATA_KEY] = json.dumps(_peft_config(lora.layers), indent=2, sort_keys=True)
    with replacing(path) as temporary:
        save_file(tensors, temporary, header)


def _peft_config(layers: dict[str, LoRALayer]) -> dict[str, Any]:
    """Arguments of PEFT's ``LoraConfig``; ranks and alphas that are not the most common one go into its patterns."""
    config: dict[str, Any] = {"target_modules": sorted(layers)}
    for key, pattern, values in (
        ("r", "rank_pattern", {name: layer.rank for name, layer in layers.items()}),
        ("lora_alpha", "alpha_pattern", {name: layer.alpha for name, layer in layers.items()}),
    ):
        config[key] = Counter(values.values()).most_common(1)[0][0]
        config[pattern] = {name: value for name, value in values.items() if value != config[key]}
    return {f"transformer.{key}": value for key, value in config.items()}


@torch.no_grad()
def fold(model: nn.Module, lora: LoRA) -> None:
    """Add a LoRA to a transformer's weights, in fp32 and rounded once.

    Raises:
        CheckpointError: The model has no such layers, or they have other shapes.
    """
    modules = dict(model.named_modules())
    weights: dict[str, Any] = {name: getattr(modules.get(name), "weight", None) for name in lora.layers}
    shapes = {name: layer.up.shape[:1] + layer.down.shape[1:] for name, layer in lora.layers.items()}
    wrong = [name for name, weight in weights.items() if weight is None or weight.shape != shapes[name]]
    if wrong:
        raise lora.misfit(
            "the model", wrong, "are not in it or have another shape", "use the model that the LoRA was made for"
        )
    for name, layer in lora.layers.items():
        weights[name].copy_(weights[name].float() + layer.delta().view(weights[name].shape))

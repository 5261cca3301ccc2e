"""Who makes the outputs of a benchmark: a renderer, or one of the two references that bound what it can reach."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.quality.interface import Item
from bernini.checkpoints.export import gather_loras
from bernini.checkpoints.lora import fold, lora_files
from bernini.conversation import Conversation, Message
from bernini.cotraining.module import CoTrainingModule
from bernini.errors import CheckpointError, DataError
from bernini.renderer.experts import FOLDERS, Experts
from bernini.renderer.frozen import TextConfig
from bernini.renderer.module import RendererModule
from bernini.renderer.sampling import SamplingConfig
from bernini.stacking import map_stacked
from bernini.tasks import get_task
from bernini.vae.codec import PIXELS_AT_ONCE, LatentCodec

Sampler = Callable[[Sequence[Conversation], Sequence[int]], list[Tensor]]
"""Makes an output ``[3, T, H, W]`` uint8 for each conversation, with the noise of its seed."""


@dataclass
class Renderer:
    """Samples with a renderer; but for rounding, no output depends on what else is in its batch.

    Attributes:
        module: The renderer, with or without a planner. Sizes come from the targets.
    """

    module: RendererModule | CoTrainingModule

    def __call__(self, conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[Tensor]:
        """Sample.

        A target only gives the size, except for a lone low-noise expert, which starts from it.
        """
        asked = [c.check().to(self.module.device) for c in conversations]
        return [made.pixels.cpu() for made in self.module.sample(asked, seeds)]


@dataclass
class Ceiling:
    """The true targets through the VAE: what a renderer that makes no mistake would reach.

    Attributes:
        codec: The VAE.
    """

    codec: LatentCodec

    def __call__(self, conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[Tensor]:
        """Encode and decode."""
        codec = self.codec
        targets = [pixels_of(c.targets[0]).to(codec.mean.device) for c in conversations]
        made = map_stacked(lambda x: codec.decode(codec.normalize(codec.posterior(x))), targets, at_once=PIXELS_AT_ONCE)
        return [pixels.cpu() for pixels in made]


def unedited(conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[Tensor]:
    """The first source as it is: what a renderer that does nothing would reach."""
    return [pixels_of(c.sources[0]) for c in conversations]


def is_edit(item: Item) -> bool:
    """Whether the item has a source of the same kind as its target."""
    spec = get_task(item.task)
    return spec.videos[0] > 0 or (spec.target == "image" and spec.images == (1, 1))


def pixels_of(message: Message) -> Tensor:
    """``[3, T, H, W]`` uint8 of an image or a clip.

    Raises:
        DataError: It was not read.
    """
    if message.media is None or message.media.pixels is None:
        raise DataError("an item's image or clip has no pixels", fix="let the benchmark's `conversation` read them")
    return message.media.pixels


def guidance(task: str, config: SamplingConfig, planned: bool = False) -> str:
    """Guidance mode of a task, with a plan or without: the one that is set, else the task's own."""
    spec = get_task(task)
    return config.mode or (spec.planned_guidance if planned else spec.guidance)


def sampling_facts(config: SamplingConfig, tasks: Sequence[str], planned: bool = False) -> dict[str, Any]:
    """What a manifest says of the sampling: all that matters, and the guidance mode of each task."""
    unused = ("frames", "height", "width", "mode", "max_pack", "max_tokens", "cache")
    settings = {name: value for name, value in asdict(config).items() if name not in unused}
    return {**settings, "guidance": {task: guidance(task, config, planned) for task in tasks}}


def load_renderer(
    model: Path,
    *,
    lora: Path | None,
    vae: Path,
    text: Path,
    rows: int,
    config: SamplingConfig,
    dtype: Literal["float32", "bfloat16"],
    device: torch.device,
) -> Renderer:
    """Read a renderer from folders.

    Args:
        model: Diffusers folder with ``transformer/`` and, for two experts, ``transformer_2/``.
        lora: LoRA to merge into them: a folder, a run or a file, as `bernini export` takes it.
        vae: The VAE's folder, or one with ``vae/``.
        text: Folder with ``text_encoder/`` and ``tokenizer/``.
        rows: Context rows of a text; the rows that the model was trained with.
        config: How to sample.
        dtype: Dtype of the weights.
        device: Where to compute.

    Raises:
        CheckpointError: A part is missing or does not fit.
    """
    experts = Experts.from_pretrained(model, getattr(torch, dtype))
    if lora is not None:
        _merge(experts, lora)
    module = RendererModule(
        vae=str(vae),
        init_from=str(model),
        text=TextConfig(encoder=str(text), rows=rows),
        sampling=config,
        frozen_dtype=dtype,
    )
    module.renderer = experts
    return Renderer(module.to(device).eval())


def _merge(experts: Experts, source: Path) -> None:
    """Fold in the LoRA of each expert that has one."""
    two = experts.transformer_2 is not None
    for expert, lora in gather_loras([source]).items():
        model = experts.models.get(FOLDERS[expert])
        if model is None or two == (expert == "single"):
            raise CheckpointError(
                "the LoRA is for no transformer of the model",
                where=lora.where,
                why=f"it is for {expert}, and the model has {' and '.join(experts.models)}",
                fix="give the LoRA's own model",
            )
        fold(model, lora)


def model_facts(model: Path, lora: Path | None, vae: Path, text: Path) -> dict[str, str]:
    """SHA-256 of each part's files, so that a manifest tells one set of weights from another."""
    transformers = sorted({*FOLDERS.values()})
    parts = {name: _files(model / name) for name in transformers}
    parts["vae"] = _files(vae / "vae" if (vae / "vae").is_dir() else vae)
    parts |= {name: _files(text / name) for name in ("text_encoder", "tokenizer")}
    if lora is not None:
        parts["lora"] = [lora] if lora.is_file() else sorted(lora_files(lora).values())
    return {name: _hash(files) for name, files in parts.items() if files}


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".model"))


def _hash(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()

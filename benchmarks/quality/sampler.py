"""Who makes the outputs of a benchmark: a renderer, or one of the two references that bound what it can reach."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.quality.interface import Item
from bernini.checkpoints.export import gather_loras
from bernini.checkpoints.lora import fold, lora_files
from bernini.contexts import check_widths
from bernini.conversation import Conversation, Message
from bernini.cotraining.module import CoTrainingModule
from bernini.errors import CheckpointError, DataError
from bernini.files import hash_files
from bernini.planner.conversations import ConversationPlanner
from bernini.planner.model import FOLDER as PLANNER
from bernini.planner.model import MLLM
from bernini.planner.planning import PlanningConfig
from bernini.renderer.experts import FOLDERS, Experts
from bernini.renderer.module import RendererModule
from bernini.renderer.rendering import Renderer
from bernini.renderer.sampling import SamplingConfig
from bernini.stacking import map_stacked
from bernini.tasks import get_task
from bernini.text.encoder import TextFeatures
from bernini.vae.codec import PIXELS_AT_ONCE, LatentCodec

Sampler = Callable[[Sequence[Conversation], Sequence[int]], list[Tensor]]
"""Makes an output ``[3, T, H, W]`` uint8 for each conversation, with the noise of its seed."""


@dataclass
class Trained:
    """Samples as a module in training does; but for rounding, no output depends on what else is in its batch.

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
class Model:
    """Samples as a model does that was read from folders, and is otherwise as `Trained`.

    Attributes:
        renderer: The renderer.
        sampling: How to render.
        planner: Plans before, if there is one.
        planning: How.
    """

    renderer: Renderer
    sampling: SamplingConfig
    planner: ConversationPlanner | None = None
    planning: PlanningConfig = field(default_factory=PlanningConfig)

    def __call__(self, conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[Tensor]:
        """Plan, if there is a planner, and render."""
        device, sampling = self.renderer.codec.mean.device, self.sampling
        asked = [c.check().to(device) for c in conversations]
        plans = None
        if self.planner is not None:
            sizes = [self.renderer.target_size(c, sampling) for c in asked]
            own = [seed % 2**32 for seed in seeds]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                plans = self.planner(asked, own, self.planning, sizes, sampling.negative_prompt)
        return [pixels.cpu() for pixels in self.renderer(asked, sampling, seeds, plans)]


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


def load_sampler(
    model: Path,
    *,
    lora: Path | None,
    vae: Path,
    text: Path,
    rows: int,
    config: SamplingConfig,
    dtype: Literal["float32", "bfloat16"],
    device: torch.device,
    planned: bool = False,
) -> Model:
    """Read a model from folders.

    Args:
        model: Diffusers folder with ``transformer/`` and, for two experts, ``transformer_2/``; with ``bernini/`` and
            ``mllm/``, if there is a plan to be.
        lora: LoRA to merge into the transformers: a folder, a run or a file, as `bernini export` takes it.
        vae: The VAE's folder, or one with ``vae/``.
        text: Folder with ``text_encoder/`` and ``tokenizer/``.
        rows: Context rows of a text; the rows that the model was trained with.
        config: How to sample.
        dtype: Dtype of the weights.
        device: Where to compute.
        planned: Whether to plan first.

    Raises:
        CheckpointError: A part is missing or does not fit.
    """
    kind = getattr(torch, dtype)
    experts = Experts.from_pretrained(model, kind)
    if lora is not None:
        _merge(experts, lora)
    planner = ConversationPlanner.from_pretrained(model, kind).to(device).eval() if planned else None
    if planner is not None:
        check_widths(planner.model.config.gen_dim, next(iter(experts.models.values())).config["text_dim"])
    codec, features = LatentCodec.from_pretrained(vae, kind).to(device), TextFeatures(str(text), None, kind).to(device)
    return Model(Renderer(experts.to(device).eval(), codec, features, rows), config, planner)


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


def model_facts(model: Path, lora: Path | None, vae: Path, text: Path, planned: bool = False) -> dict[str, str]:
    """SHA-256 of each part's files, so that a manifest tells one set of weights from another."""
    own = [*sorted({*FOLDERS.values()}), *([PLANNER, MLLM] if planned else [])]
    parts = {name: _files(model / name) for name in own}
    parts["vae"] = _files(vae / "vae" if (vae / "vae").is_dir() else vae)
    parts |= {name: _files(text / name) for name in ("text_encoder", "tokenizer")}
    if lora is not None:
        parts["lora"] = [lora] if lora.is_file() else sorted(lora_files(lora).values())
    return {name: hash_files(files) for name, files in parts.items() if files}


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".model"))

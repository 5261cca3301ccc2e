"""A model's parts, found in one folder or picked from several, and held against their configurations."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from transformers import Qwen2_5_VLConfig, UMT5Config, UMT5EncoderModel

from bernini.checkpoints.parts import PLANNER, TEXT_ENCODER, TOKENIZER, TRANSFORMER, TRANSFORMER_2, VAE, Part, first_of
from bernini.checkpoints.stored import StoredTensor, check_fit
from bernini.errors import CheckpointError
from bernini.planner.model import PlannerConfig, planner_shapes, shaped
from bernini.pretrained import shapes
from bernini.renderer.transformer import PackedWanTransformer3DModel

MODELS = {part.name: part for part in (TRANSFORMER, TRANSFORMER_2, TEXT_ENCODER, VAE, PLANNER)}
FOLDERS = {"tokenizer": TOKENIZER, "scheduler": ("scheduler",)}
"""What is copied as it is, and where layouts keep it."""


@dataclass(frozen=True)
class Found:
    """A part that has weights.

    Attributes:
        whole: Its tensors by its own names, tied ones under both of theirs; in the model's order.
        tensors: The same, without those that the weights leave to another that they are tied to.
        config: Its configuration.
        source: The folder of the model that the weights were found in.
    """

    whole: dict[str, StoredTensor]
    tensors: dict[str, StoredTensor]
    config: Path
    source: Path


@dataclass(frozen=True)
class Gathered:
    """Parts of a model.

    Attributes:
        models: Those that have weights, by name.
        folders: Those that are folders to copy, by name.
        sources: Where they were looked for.
    """

    models: dict[str, Found]
    folders: dict[str, Path]
    sources: Sequence[Path]


def gather(sources: Sequence[Path], wanted: Collection[str], optional: Collection[str] = ()) -> Gathered:
    """Find parts, each in the first folder that has it.

    Args:
        sources: Folders of models, or of parts of them, in any layout.
        wanted: Names of the parts.
        optional: Names of those that may be missing.

    Raises:
        CheckpointError: A part is not there, damaged, or does not fit its configuration or the other parts.
    """
    models = {name: part for name in wanted if name in MODELS and (part := _find(sources, MODELS[name]))}
    folders = {name: folder for name in wanted if name in FOLDERS and (folder := _first(sources, FOLDERS[name]))}
    if missing := [name for name in wanted if name not in {*models, *folders, *optional}]:
        name = missing[0]
        places = [place.folder for place in MODELS[name].places] if name in MODELS else FOLDERS[name]
        raise CheckpointError(
            f"no {MODELS[name].title if name in MODELS else name} here",
            where=", ".join(map(str, sources)),
            why=f"it was looked for in {', '.join(dict.fromkeys(places))}",
            fix="name one more folder that has it, such as that of the model which was trained further",
        )
    _check_together(models)
    return Gathered(models, folders, sources)


def _first(sources: Sequence[Path], names: tuple[str, ...]) -> Path | None:
    """The first folder of one of these names."""
    return next((folder for source in sources if (folder := first_of(source, names))), None)


def _find(sources: Sequence[Path], part: Part) -> Found | None:
    """A part in the first folder that has its weights, with the configuration from there, else from the first one."""
    for source in sources:
        if tensors := part.find(source):
            configs = [config for root in (source, *sources) if (config := part.config(root))]
            if not configs:
                raise CheckpointError(
                    f"no configuration of the {part.title} here",
                    where=", ".join(map(str, sources)),
                    why=f"its weights are in {source}, but none of them has {' or '.join(part.configs)}",
                    fix="name one more folder that has it, such as that of the model which was trained further",
                )
            expected, tied = _expected(part, configs[0], tensors)
            pairs = {**tied, **{other: one for one, other in tied.items()}}
            doubles = {name: tensors[other] for name, other in pairs.items() if other in tensors}
            check_fit(part.title, configs[0], tensors, expected, optional=doubles)
            whole = {name: (doubles | tensors)[name] for name in expected}
            return Found(whole, {name: whole[name] for name in whole if name in tensors}, configs[0], source)
    return None


def _expected(
    part: Part, config: Path, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """Shapes of a part's tensors by name, and names of tied ones with those that they are tied to."""
    if part in (TRANSFORMER, TRANSFORMER_2):
        return shapes(PackedWanTransformer3DModel, config), {}
    if part is VAE:
        return shapes(AutoencoderKLWan, config), {}
    try:
        if part is PLANNER:
            mllm = Qwen2_5_VLConfig.from_pretrained(config.parent, local_files_only=True)
            return planner_shapes(shaped(PlannerConfig(), tensors), mllm)
        with torch.device("meta"):
            text = UMT5EncoderModel(UMT5Config.from_pretrained(config.parent, local_files_only=True))
        return {name: tensor.shape for name, tensor in text.state_dict().items()}, text.all_tied_weights_keys
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"the {part.title}'s configuration cannot be used",
            where=str(config),
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
        ) from error


WIDTHS = {
    "transformer": ("condition_embedder.text_embedder.linear_1.weight", 1),
    "transformer_2": ("condition_embedder.text_embedder.linear_1.weight", 1),
    "text_encoder": ("encoder.final_layer_norm.weight", 0),
    "planner": ("connector.proj_gen.3.weight", 0),
}
"""A tensor of each part, and its axis, that has as many channels as the renderer's context."""


def _check_together(models: Mapping[str, Found]) -> None:
    """Refuse parts of models that do not fit each other."""
    experts = [models[name] for name in ("transformer", "transformer_2") if name in models]
    made = [{name: tensor.shape for name, tensor in expert.tensors.items()} for expert in experts]
    if made[1:] and made[0] != made[1]:
        raise CheckpointError(
            "the two experts are of different models",
            where=", ".join(str(expert.config) for expert in experts),
            why="their tensors do not have the same names and shapes",
            fix="name folders of one model",
        )
    widths = {part: models[part].tensors[name].shape[axis] for part, (name, axis) in WIDTHS.items() if part in models}
    if len({*widths.values()}) > 1:
        raise CheckpointError(
            "these parts do not fit each other",
            where=", ".join(dict.fromkeys(str(models[part].source) for part in widths)),
            why="channels of the renderer's context: " + ", ".join(f"{part} {width}" for part, width in widths.items()),
            fix="name folders of one model, or of parts that were trained together",
        )

"""Reading models of diffusers' classes, with nothing missing and nothing left over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin, no_init_weights

from bernini.checkpoints.parts import read_json
from bernini.checkpoints.stored import StoredTensor, check_fit, load
from bernini.errors import CheckpointError

Model = TypeVar("Model", bound=ModelMixin)


def load_pretrained(kind: type[Model], folder: Path, dtype: torch.dtype, *, what: str, fix: str) -> Model:
    """Read a folder with ``config.json`` and safetensors; pickles are never opened.

    Args:
        kind: Class of the model.
        folder: The model's own folder.
        dtype: Dtype of the weights; modules that the class keeps in fp32 stay so.
        what: What was looked for, for the error.
        fix: What to do when it is not there.

    Raises:
        CheckpointError: The folder holds no such model, or not exactly its tensors.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"no {what} in {folder}", where=str(folder / "config.json"), why="the file does not exist", fix=fix
        )
    try:
        model, report = kind.from_pretrained(  # type: ignore[attr-defined]  # a pair, with output_loading_info
            folder, torch_dtype=dtype, output_loading_info=True, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the {what} cannot be read",
            where=str(folder),
            why=str(error).strip().splitlines()[0],
            fix="use config.json and safetensors that belong together",
        ) from error
    missing, unknown = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unknown:
        counts = (
            f"{len(keys)} {name}, e.g. {keys[0]}" for name, keys in (("missing", missing), ("unknown", unknown)) if keys
        )
        raise CheckpointError(
            f"the {what} does not have the tensors of its config.json",
            where=str(folder),
            why="; ".join(counts),
            fix="use config.json and safetensors that belong together",
        )
    return model


def shapes(kind: type[Model], config: Path) -> dict[str, torch.Size]:
    """Names and shapes of the tensors that a configuration asks for.

    Raises:
        CheckpointError: It is none of this class.
    """
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in _build(kind, config).state_dict().items()}


def load_stored(
    kind: type[Model], config: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype, *, what: str
) -> Model:
    """A model with weights that lie among others', where `load_pretrained` cannot read them.

    Args:
        kind: Class of the model.
        config: Its configuration.
        tensors: Its tensors by name.
        dtype: Dtype of the weights; modules that the class keeps in fp32 stay so.
        what: What it is, for the error.

    Raises:
        CheckpointError: The tensors are not exactly those of the configuration.
    """
    check_fit(what, config, tensors, shapes(kind, config))
    whole: set[str] = set(kind._keep_in_fp32_modules or ())
    kept = {name: tensor for name, tensor in tensors.items() if whole & {*name.split(".")}}
    rest = {name: tensor for name, tensor in tensors.items() if name not in kept}
    with no_init_weights():  # memory that nothing is written to is not taken
        model = _build(kind, config)
    model.load_state_dict(load(kept, torch.float32) | load(rest, dtype), assign=True)
    return model.eval()


def _build(kind: type[Model], config: Path) -> Model:
    """A model whose weights are not yet read."""
    told: Any = kind
    try:
        return told.from_config(read_json(config))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            "a configuration cannot be used", where=str(config), why=f"{type(error).__name__}: {error}"
        ) from error

"""Reading models that diffusers saved, with nothing missing and nothing left over."""

from pathlib import Path
from typing import TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin

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

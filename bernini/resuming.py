"""Which checkpoint a run goes on from, and whether it is one."""

from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from bernini.errors import CheckpointError, ConfigError

_say = rank_zero_only(print)


def resolve_checkpoint(asked: str | None, callbacks: list[Any], *, needed: bool) -> str | None:
    """Find and look at a checkpoint before anything is built.

    Args:
        asked: A file, a folder of a sharded checkpoint, ``auto`` for the newest of the run, or nothing.
        callbacks: Configured callbacks, as class paths with arguments.
        needed: Whether ``auto`` must find one; a fit starts afresh without.

    Returns:
        The checkpoint's path, if any.

    Raises:
        ConfigError: There is no such checkpoint, or ``auto`` cannot know where to look.
        CheckpointError: The file is not a checkpoint, or a damaged one.
    """
    if asked != "auto":
        if asked:
            _check(Path(asked))
        return asked
    last = _last(callbacks)
    if last is None:
        if needed:
            raise ConfigError("this run has no checkpoint yet", where="ckpt_path: auto", fix="name one, or fit first")
        _say("no checkpoint yet: starting afresh")
        return None
    _check(last)
    _say(f"resuming from {last}")
    return str(last)


def _last(callbacks: list[Any]) -> Path | None:
    """Newest ``last*.ckpt`` in the folders that the configured ModelCheckpoint callbacks write to."""
    arguments = [callback.get("init_args") or {} for callback in callbacks]
    folders = [Path(a["dirpath"]) for a in arguments if a.get("dirpath") and a.get("save_last")]
    if not folders:
        raise ConfigError(
            "--ckpt_path auto does not know where to look",
            why="no ModelCheckpoint has a dirpath and save_last",
            fix="add lightning.pytorch.callbacks.ModelCheckpoint with dirpath and save_last: true",
        )
    found = [path for folder in folders for path in folder.glob("last*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _check(path: Path) -> None:
    where = f"ckpt_path: {path}"
    if not path.exists():
        raise ConfigError("the checkpoint does not exist", where=where, fix="check the path, or --ckpt_path auto")
    fix = "name a checkpoint that `bernini fit` wrote; weights to start from belong in model.init_args.init_from"
    if path.is_dir():
        if not (path / "meta.pt").is_file():
            raise CheckpointError("the folder is not a checkpoint", where=where, why="it has no meta.pt", fix=fix)
        return
    if not is_zipfile(path):
        raise CheckpointError("the file is not a checkpoint, or is cut short", where=where, fix=fix)
    try:
        stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # mmap: reads no tensor
    except Exception as error:  # torch raises whatever its unpickler stumbles over
        why = str(error).strip().splitlines()[0]
        raise CheckpointError("the checkpoint cannot be read", where=where, why=why, fix=fix) from error
    if not isinstance(stored, dict) or "state_dict" not in stored or "pytorch-lightning_version" not in stored:
        raise CheckpointError("the file holds no Lightning checkpoint", where=where, fix=fix)


class HostCheckpointIO(TorchCheckpointIO):
    """Reads checkpoints to the host by its name, as the eight-bit states of torchao's optimizers want it."""

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning's own, whose default for ``map_location`` is a function, which their tensors refuse."""
        return super().load_checkpoint(path, map_location, weights_only)

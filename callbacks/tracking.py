"""Weights & Biases as a witness: it sees no secrets, and a run does not depend on it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_warn

from bernini.environment import hide
from bernini.errors import ConfigError
from bernini.files import replacing

ID_FILE = "wandb-run.txt"
"""File beside the checkpoints that holds the id of the W&B run they belong to."""

SETTINGS: dict[str, Any] = {
    # What W&B would gather by itself can hold secrets: console output, uncommitted changes, the remote's address.
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    # After this many seconds an upload that does not get through is left to `wandb sync`.
    "finish_timeout": 600.0,
}
P = ParamSpec("P")


def _surviving(method: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
    """A method of `Wandb` whose failure is told, and then forgotten."""

    @wraps(method)
    def survived(self: "Wandb", *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # whatever it is: days of training weigh more than a point of a curve
            self._lost(error)

    return survived


class Wandb(WandbLogger):
    """Logs to W&B; training goes on when W&B does not.

    Without an API key, or when W&B cannot be reached, the run is kept offline for `wandb sync`. A failure is told once,
    and a service process that died is started again. The id of the run is kept beside the checkpoints, so that a fit
    from one of them goes on with the same run; ``WANDB_RUN_ID`` goes before that.

    Args:
        project: Project of the run.
        save_dir: Folder in which W&B keeps its own, ``wandb/``. Any number of runs may share it.
        name: Name of the run; W&B invents one if null.
        id: Id of the run to go on with.
        entity: User or team that the project belongs to.
        group: Runs of one group are shown together.
        tags: Labels to find the run by.
        notes: What the run is for.
        mode: ``online``, ``offline`` or ``disabled``; as ``WANDB_MODE`` says if null, else online.
    """

    def __init__(
        self,
        project: str = "bernini",
        save_dir: str = "runs",
        name: str | None = None,
        id: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
    ) -> None:
        super().__init__(
            name, save_dir, id=id, project=project, entity=entity, group=group, tags=tags, notes=notes, mode=mode
        )
        self._modes: list[Any] = []  # to try, in this order
        self._told: set[str] = set()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run in W&B, begun when it is first asked for.

        Raises:
            ConfigError: W&B refuses the key or the arguments.
        """
        if self._experiment is None:
            self._experiment = self._begin()
            self._wandb_init["id"] = self._experiment.id
        return self._experiment

    def go_on_from(self, checkpoint: str | None) -> None:
        """Continue the run that a checkpoint belongs to, unless the configuration names an id.

        Args:
            checkpoint: File or folder of the checkpoint; without one, the run is a new one.
        """
        file = Path(checkpoint).parent / ID_FILE if checkpoint else None
        if file and file.is_file() and not self._wandb_init["id"]:
            self._wandb_init["id"] = file.read_text().strip()

    @_surviving
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Note the run's id beside the checkpoint."""
        folder = Path(checkpoint_callback.dirpath or "")
        if self.version and checkpoint_callback.dirpath and folder.is_dir():  # a folder in the cloud is none
            with replacing(folder / ID_FILE) as temporary:
                temporary.write_text(f"{self.version}\n")

    @_surviving
    def finalize(self, status: str) -> None:
        """Finish the run; the next logger in this process begins one of its own."""
        if self._experiment is not None:
            run, self._experiment = self._experiment, None
            run.finish(exit_code=int(status != "success"))

    log_metrics = _surviving(WandbLogger.log_metrics)
    log_hyperparams = _surviving(WandbLogger.log_hyperparams)
    log_table = _surviving(WandbLogger.log_table)
    log_text = _surviving(WandbLogger.log_text)
    log_image = _surviving(WandbLogger.log_image)
    log_audio = _surviving(WandbLogger.log_audio)
    log_video = _surviving(WandbLogger.log_video)
    watch = _surviving(WandbLogger.watch)

    def _begin(self) -> Any:
        """A run in the best mode that works; a disabled one takes everything and keeps nothing."""
        import wandb

        arguments = {name: value for name, value in self._wandb_init.items() if value is not None}
        arguments |= {"id": os.environ.get("WANDB_RUN_ID") or self._wandb_init["id"]}
        settings = wandb.Settings(**SETTINGS, git_commit=_commit())
        why = "" if self._modes else self._choose_modes()
        for mode in self._modes:
            try:
                with _without_arguments():
                    run = wandb.init(**arguments | {"mode": mode, "settings": settings})
            except wandb.errors.UsageError as error:
                raise ConfigError("W&B refuses the run", where="trainer.logger", why=hide(str(error))) from error
            except Exception as error:  # it can be anything, from a refused connection to a full disk
                why = f"W&B cannot begin a run that is {mode} ({_line(error)})"
                continue
            self._modes = self._modes[self._modes.index(mode) :]  # what failed once is not tried again
            if why:
                kept = f"the run is kept offline, and `wandb sync {run.settings.sync_dir}` uploads it"
                self._tell(f"{why}: {kept if mode == 'offline' else 'the run is not logged there'}")
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            return run
        raise AssertionError("a disabled run always begins")

    def _choose_modes(self) -> str:
        """Set the modes to try, and say why the first is not what was asked for, if so."""
        import wandb

        mode = self._wandb_init["mode"] or wandb.setup().settings.mode
        self._modes = [mode, "disabled"]
        if mode not in ("online", "run"):
            return ""
        try:
            has_key = wandb.login(prompt=False, verify=False)
        except wandb.errors.AuthenticationError as error:
            raise ConfigError("the W&B key is none", why=hide(str(error)), fix="run `wandb login`") from error
        self._modes = [*(["online"] if has_key else []), "offline", "disabled"]
        return "" if has_key else "W&B has no API key (`wandb login`)"

    def _lost(self, error: Exception) -> None:
        """Tell what W&B could not take; forget a service that is gone, so that the next call starts another."""
        self._tell(f"W&B lost something, training goes on: {type(error).__name__}: {_line(error)}")
        if isinstance(error, ConnectionError):
            import wandb

            self._experiment = None
            with suppress(Exception, SystemExit):  # W&B would exit as its service did
                wandb.teardown()

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            rank_zero_warn(message)


def _line(error: Exception) -> str:
    """An error in one line, without values from the environment."""
    return hide(" ".join(str(error).split())[:300])


@contextmanager
def _without_arguments() -> Iterator[None]:
    """Hide the command line, which W&B would keep with whatever a shell has filled in."""
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = arguments


def _commit() -> str | None:
    """Commit of the checkout that the run is started in, if any."""
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None

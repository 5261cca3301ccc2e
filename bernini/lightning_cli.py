"""`bernini fit | validate | test | predict`: LightningCLI with its traps closed."""

from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from bernini.config_errors import check_files, explain
from bernini.environment import remember_environment
from bernini.errors import BerniniError, CheckpointError, ConfigError
from bernini.resuming import resolve_checkpoint
from bernini.strategy import ShardedStrategy

LINKS = {
    "seed_everything": ("model.init_args.seed", "data.init_args.seed"),
    "model.init_args.vision": ("data.init_args.vision",),
}
"""Values that several places need, written once. A link overwrites its targets, so a target may not be set; it does
nothing where a class lacks the key."""


class BerniniCLI(LightningCLI):
    """Model and data are chosen by class path; see ``configs/`` for whole examples."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what a user or a sweep may override in one place."""
        for source, targets in LINKS.items():
            for target in targets:
                parser.link_arguments(source, target)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was handed in; Lightning would warn that the process has arguments too."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would lay the checkpoint's hyper-parameters over the user's configuration."""

    def before_instantiate_classes(self) -> None:
        """Settle which checkpoint to go on from before anything is built."""
        if self.subcommand:
            config = self.config[self.subcommand]
            callbacks = config["trainer"]["callbacks"] or []
            config["ckpt_path"] = resolve_checkpoint(config["ckpt_path"], callbacks, needed=self.subcommand != "fit")

    def before_fit(self) -> None:
        """Tell the model which checkpoint it goes on from, and let W&B go on with the run that this belongs to."""
        from callbacks.tracking import Wandb  # siblings of this package are not imported before they are used

        self.model.resumes_from = self.config["fit"]["ckpt_path"]
        for logger in self.trainer.loggers:
            if isinstance(logger, Wandb):
                logger.go_on_from(self.config["fit"]["ckpt_path"])

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer; what it refuses is the configuration's fault."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:
            raise ConfigError("the trainer cannot be set up", where="trainer", why=str(error).strip()) from error
        _check_sizes(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; a checkpoint that does not fit the model, or a request that Lightning refuses, is the input's fault."""
        try:
            super()._run_subcommand(subcommand)
        except MisconfigurationException as error:
            raise ConfigError("the trainer cannot do this", where="trainer", why=str(error).strip()) from error
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            first, *more = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
            raise CheckpointError(
                "the checkpoint does not fit the model",
                where=f"ckpt_path: {self.config[subcommand]['ckpt_path']}",
                why=first[:200] + (f" (and {len(more)} more)" if more else ""),
                fix="use the model configuration that the checkpoint was trained with",
            ) from error


def _check_sizes(trainer: L.Trainer) -> None:
    """Lightning's own sizes would be one data-parallel rank per node: nothing would be sharded."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, ShardedStrategy):
        sizes = {name: getattr(strategy, f"_{name}") for name in ("data_parallel_size", "tensor_parallel_size")}
        if unset := [name for name, size in sizes.items() if size == "auto"]:
            raise ConfigError(
                f"{' and '.join(unset)} of ModelParallelStrategy must be set",
                where="trainer.strategy.init_args",
                why="left to themselves they shard nothing on one machine",
                fix=f"data_parallel_size: {trainer.world_size} and tensor_parallel_size: 1, or let "
                "bernini.strategy.ShardedStrategy count the GPUs",
            )


def run_lightning(args: Sequence[str], run: bool = True) -> BerniniCLI:
    """Parse a command line and, unless told otherwise, run it.

    Args:
        args: Verb and options.
        run: Whether to run, or only to build model, data and trainer (then without a verb).

    Raises:
        ConfigError: The configuration cannot be used.
        DataError: The data cannot be used.
        CheckpointError: Weights or a checkpoint cannot be used.
    """
    from callbacks.config import SaveConfig  # siblings of this package are not imported before they are used

    remember_environment()
    check_files(args, {target: source for source, targets in LINKS.items() for target in targets})
    try:
        return BerniniCLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # it would keep the whole configuration with the model
            parser_kwargs={"parser_mode": "omegaconf", "exit_on_error": False},
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},  # Lightning's own file forbids a second run
            args=list(args),
            run=run,
        )
    except ArgumentError as error:
        raise _ours(error) or explain(error, args) from error
    except OmegaConfBaseException as error:
        raise ConfigError(
            "an interpolation cannot be resolved",
            where=str(error.full_key or ""),
            why=str(error.msg or error).splitlines()[0],
            fix="set what it names, or give a default: ${oc.env:NAME,default}",
        ) from error
    except ValueError as error:
        raise _ours(error) or error from None


def _ours(error: BaseException) -> BerniniError | None:
    """The error that a constructor raised, which the parser wraps."""
    return next((cause for cause in _causes(error) if isinstance(cause, BerniniError)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

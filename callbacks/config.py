"""The resolved configuration, kept with the run."""

from pathlib import Path

import lightning as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from bernini.environment import hide
from bernini.errors import ConfigError
from bernini.files import replacing


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into ``trainer.default_root_dir`` and hands the configuration to W&B.

    Values that came from the environment are written as the expressions that name them.
    """

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Called on rank zero before the run starts.

        Raises:
            ConfigError: The folder cannot be written.
        """
        config = hide(yaml.safe_load(self.parser.dump(self.config, skip_unset=False)))
        path = Path(trainer.default_root_dir) / ("config.yaml" if stage == "fit" else f"config-{stage}.yaml")
        try:
            with replacing(path) as temporary:
                temporary.write_text(yaml.safe_dump(config, sort_keys=False))
        except OSError as error:
            raise ConfigError("the run's folder cannot be written", where=str(path), why=str(error)) from error
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(config)

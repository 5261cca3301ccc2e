"""Optimizer and schedule from the configuration, also when a checkpoint brings others along."""

from math import isclose
from typing import Any

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from bernini.errors import ConfigError

RATES = ("initial_lr", "max_lr", "min_lr", "weight_decay")


class ConfiguredOptimizer(L.LightningModule):
    """A module that trains its trainable parameters with the configured optimizer and schedule.

    A checkpoint restores what the optimizer has gathered and how far the schedule is. Learning rates and weight decay
    are the configuration's, so that a resumed run may change them.
    """

    optimizer: OptimizerCallable
    lr_scheduler: LRSchedulerCallable | None
    resumes_from: str | None = None

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that are learned at any time of a run, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def trainable(self) -> list[nn.Parameter]:
        """Parameters that are learned at any time of a run."""
        return list(self.named_trainable().values())

    def param_groups(self) -> Any:
        """What the optimizer is given: parameters, or groups of them with rates of their own."""
        return self.trainable()

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule, which is stepped every optimizer step.

        Raises:
            ConfigError: The optimizer or the schedule refuses its arguments, or the schedule overrules groups' rates.
        """
        try:
            optimizer = self.optimizer(self.param_groups())
            rates = [group["lr"] for group in optimizer.param_groups]
            scheduler = self.lr_scheduler(optimizer) if self.lr_scheduler else None
        except (TypeError, ValueError) as error:
            raise ConfigError(
                "the optimizer cannot be built", where="model.init_args.optimizer, lr_scheduler", why=str(error)
            ) from error
        scheduled = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        if any(not isclose(new * rates[0], old * scheduled[0]) for old, new in zip(rates, scheduled, strict=True)):
            raise ConfigError(
                "the schedule overrules the learning rates of parts",
                where="model.init_args.lr_scheduler",
                why=f"they are {rates}, and it makes {scheduled} of them",
                fix="use a schedule of factors, such as LinearLR, or give OneCycleLR a list of max_lr",
            )
        self._configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self._base_rates = getattr(scheduler, "base_lrs", None)
        if scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_train_start(self) -> None:
        """Put the configured rates over those of a checkpoint; what the schedule has made of them so far stays."""
        for group, configured in zip(self.trainer.optimizers[0].param_groups, self._configured, strict=True):
            old, new = (g.get("initial_lr", g["lr"]) for g in (group, configured))
            if old != new:
                group["lr"] = new * (group["lr"] / old)
            group.update({name: configured[name] for name in RATES if name in configured})
        for schedule in self.trainer.lr_scheduler_configs:
            if self._base_rates is not None:
                schedule.scheduler.base_lrs = list(self._base_rates)

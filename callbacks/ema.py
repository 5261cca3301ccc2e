"""Exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed import get_rank
from torch.distributed.tensor import DTensor, distribute_tensor

from bernini.errors import CheckpointError, ConfigError
from bernini.optimizing import ConfiguredOptimizer


def _local(x: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; averaging is elementwise, so shards need no communication."""
    return x.to_local() if isinstance(x, DTensor) else x


def _like(x: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, placed and sharded as a parameter is."""
    x = x.to(parameter.device)
    if isinstance(parameter, DTensor) and not isinstance(x, DTensor):
        return distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return x


class EMA(L.Callback):
    """Averages the trainable parameters after every optimizer step; validation, samples and exports use the average.

    The average is kept in fp32, sharded as the parameters are.

    Args:
        decay: Weight of the past, e.g. 0.9999.
        warmup: Start with a shorter memory, ``(1 + step) / (10 + step)``, until that reaches ``decay``.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"EMA decay is {decay}", why="a decay lies in [0, 1)", fix="0.9999")
        self.decay, self.warmup = decay, warmup
        self._average: dict[str, Tensor] = {}
        self._live: dict[str, Tensor] = {}
        self._step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from the weights, unless a checkpoint brings an average."""
        if not self._average:
            self._average = {name: p.detach().float().clone() for name, p in _trained(pl_module).items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from where the run stands."""
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a step of the average when the optimizer took one."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self._step) / (10 + self._step)) if self.warmup else self.decay
        trained = self._place(pl_module)
        averages = [_local(self._average[name]) for name in trained]
        torch._foreach_lerp_(averages, [_local(p).float() for p in trained.values()], 1 - decay)

    @torch.no_grad()
    def swap_in(self, pl_module: L.LightningModule) -> None:
        """Put the average into the module and the live weights aside; nothing happens without an average."""
        if self._average:
            for name, parameter in self._place(pl_module).items():
                self._live[name] = _local(parameter).clone()
                _local(parameter).copy_(_local(self._average[name]))

    @torch.no_grad()
    def swap_out(self, pl_module: L.LightningModule) -> None:
        """Put the live weights back, if they are aside; a run that fails early may have no weights at all."""
        for name, parameter in (_trained(pl_module) if self._live else {}).items():
            if name in self._live:
                _local(parameter).copy_(self._live.pop(name))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the average."""
        self.swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the live weights."""
        self.swap_out(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Go back to the live weights, which a checkpoint of last resort has to hold."""
        self.swap_out(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors of the average, on rank zero, which writes them; every rank has to call."""
        average = {}
        for name, value in self._average.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if whole is value or get_rank() == 0:
                average[name] = whole.cpu()
        return {"average": average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._average = dict(state_dict["average"])

    def _place(self, pl_module: L.LightningModule) -> dict[str, torch.nn.Parameter]:
        """Bring an average that a checkpoint brought to where the parameters are, and give these."""
        trained = _trained(pl_module)
        if {n: p.shape for n, p in trained.items()} != {n: a.shape for n, a in self._average.items()}:
            raise CheckpointError(
                "the checkpoint's average is not of the weights that are trained now",
                fix="train the same weights, or start from exported ones (init_from)",
            )
        self._average = {name: _like(self._average[name], p) for name, p in trained.items()}
        return trained


def _trained(pl_module: L.LightningModule) -> dict[str, torch.nn.Parameter]:
    assert isinstance(pl_module, ConfiguredOptimizer)
    return pl_module.named_trainable()


@contextmanager
def best_weights(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Averaged weights where the run keeps an average, else the live ones."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averages = [c for c in callbacks if isinstance(c, EMA)]
    for ema in averages:
        ema.swap_in(pl_module)
    try:
        yield
    finally:
        for ema in averages:
            ema.swap_out(pl_module)

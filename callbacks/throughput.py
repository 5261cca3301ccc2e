"""How fast a run is, and what holds it up."""

import sys
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed import all_gather_object

from bernini.errors import ConfigError
from bernini.flop import Meter
from bernini.peaks import peak_tflops as known_peak
from bernini.sharding import data_rank
from callbacks.speeds import Counted, slowest, summarize
from callbacks.timeline import OUTSIDE, SECTIONS, Fetching, Timeline

NOTED = 0.05  # of a step: a rank that is behind by less is not spoken of


class Throughput(L.Callback):
    """Logs how fast a run is under ``speed/``, every ``log_every_n_steps``, of all ranks since the last time.

    Lightning's ``ThroughputMonitor`` waits for the device in every step, takes batches for equally large, looks at rank
    zero alone, and knows neither the sections of a step nor recompilation.

    Training goes on as without it, to the bit. Between points nothing waits for the device; at each, ranks exchange
    some numbers. docs/throughput.md says what the figures mean.

    Args:
        peak_tflops: TFLOP/s of one device that are 100 % MFU. If null, its dense bf16 peak where `bernini.peaks` knows
            it; elsewhere MFU is left out.

    Raises:
        ConfigError: The peak is not positive.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise ConfigError(
                f"peak_tflops is {peak_tflops}",
                where="callbacks.Throughput",
                why="it is what a device does at most, in TFLOP/s",
                fix="leave it out, or give what the data sheet says of dense matrix products",
            )
        self.peak = peak_tflops
        self._meter: Meter | None = None
        self._noted: tuple[int, str] | None = None

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        device = pl_module.device
        if self.peak is None and device.type == "cuda":
            self.peak = known_peak(torch.cuda.get_device_name(device))
        self._meter, self._timeline = Meter(pl_module), Timeline(device)
        trainer.profiler = Fetching(trainer.profiler, self._timeline)
        self._step = self._logged = trainer.global_step
        self._samples, self._compiled = 0, _compiled()
        self._timeline.mark("rest")

    def on_train_batch_start(self, trainer: Any, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there."""
        self._samples += len(batch)
        self._timeline.mark("forward")

    def on_before_backward(self, trainer: Any, pl_module: L.LightningModule, loss: Tensor) -> None:
        """The loss is there."""
        self._timeline.mark("backward")

    def on_after_backward(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Gradients are there."""
        self._timeline.mark("rest")

    def on_before_optimizer_step(self, trainer: Any, pl_module: L.LightningModule, optimizer: Any) -> None:
        """All gradients of a step are there."""
        self._timeline.mark("optimizer")

    def on_train_batch_end(
        self, trainer: Any, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, if it is time to."""
        self._timeline.mark("rest")
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if trainer.log_every_n_steps and self._step % trainer.log_every_n_steps == 0:
                self._log(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Validation is no part of training."""
        if self._meter:
            self._timeline.mark(OUTSIDE)

    def on_validation_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Training goes on."""
        if self._meter:
            self._timeline.mark("rest")

    def on_train_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Leave models and trainer as they were."""
        if self._meter:
            self._meter.remove()
            self._meter = None
        if isinstance(trainer.profiler, Fetching):
            trainer.profiler = trainer.profiler.inner

    def on_exception(self, trainer: Any, pl_module: L.LightningModule, exception: BaseException) -> None:
        """As at the end."""
        self.on_train_end(trainer, pl_module)

    def _log(self, trainer: Any, pl_module: L.LightningModule) -> None:
        ranks = [self._count()]
        if trainer.world_size > 1:
            ranks *= trainer.world_size
            all_gather_object(ranks, ranks[0])
        copies = len(ranks) / data_rank(pl_module)[1]
        budget = getattr(getattr(trainer.datamodule, "pack", None), "tokens", None)
        figures = summarize(ranks, copies, self.peak, budget)
        shown = {"speed/samples_per_s", "speed/data_wait", "speed/mfu" if "speed/mfu" in figures else "speed/tflops"}
        if len(ranks) > 1:
            figures |= self._look_for_slowest(ranks)
        for name, value in figures.items():
            pl_module.log(name, value, on_step=True, on_epoch=False, prog_bar=name in shown)

    def _look_for_slowest(self, ranks: list[Counted]) -> dict[str, float]:
        """The rank that others wait for, and its sections; says so whenever it is another, or for another reason."""
        number, section, behind = slowest(ranks)
        rank, share = ranks[number], behind / ranks[number].seconds
        if share > NOTED and (number, section) != self._noted:
            self._noted = number, section
            rank_zero_info(f"other ranks wait for rank {number} during {share:.0%} of a step: {section}")
        times = {f"speed/slowest/{name}_s": rank.section(name) / max(1.0, rank.steps) for name in SECTIONS}
        return {"speed/slowest/rank": float(number), "speed/slowest/behind": share} | times

    def _count(self) -> Counted:
        """What this rank has counted since the last time."""
        assert self._meter
        times, device = self._timeline.read(), self._timeline.device
        done, self._meter.done = self._meter.done, []
        samples, self._samples = self._samples, 0
        steps, self._logged = self._step - self._logged, self._step
        compiled, self._compiled = _compiled() - self._compiled, _compiled()
        parts = {part: [one for one in done if one.part == part] for part in ("renderer", "planner")}
        return Counted(
            samples=samples,
            steps=steps,
            flop=float(sum(one.flop for one in done)),
            compiled=max(0, compiled),  # a reset of the compiler begins anew
            memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
            packs=len(parts["renderer"]),
            **{f"{part}_tokens": sum(one.tokens for one in own) for part, own in parts.items()},
            **{f"{part}_targets": sum(one.targets for one in own) for part, own in parts.items()},
            **{name: times[name] for name in SECTIONS},
        )


def _compiled() -> int:
    """Graphs that ``torch.compile`` has made in this process; looking does not import a compiler."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0

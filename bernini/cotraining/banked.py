"""Co-training from a bank of prepared samples, for models whose kernels take longer to be launched than to run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bernini.bank import Rows
from bernini.cotraining.bank import CoBank
from bernini.cotraining.module import CoTrainingModule
from bernini.cotraining.passing import COINS, SUMS, CoTrainingPass
from bernini.cotraining.stages import Stage
from bernini.errors import ConfigError
from bernini.planner.bank import NAMES
from bernini.planner.banked import SUMS as PLAN_SUMS
from bernini.planner.banked import PlanPass, add_sums, draw_ratios, record
from bernini.renderer.banked import draw_levels
from bernini.renderer.experts import experts_of
from bernini.seeds import draw_seed
from bernini.tasks import TASKS


class BankedCoTrainingModule(CoTrainingModule):
    """A `CoTrainingModule` that trains from the bank of its data module, forward and backward as one CUDA graph.

    The losses are the parent's, each a mean over what it weighs. A batch holds the same number of samples of each kind
    (task and number of sources); what they lose, hide and tell is drawn on the device. Every stage is recorded anew.
    Validation and sampling are the parent's.

    Args:
        *args: As `CoTrainingModule`.
        cuda_graphs: Record forward and backward as CUDA graphs, on CUDA.
        **kwargs: As `CoTrainingModule`.
    """

    def __init__(self, *args: Any, cuda_graphs: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refused = {
            "recompute": (self.recompute.replace("none", ""), "a CUDA graph records no second forward", "none"),
            "exposure.planning.order": (
                self.exposure.planned and self.exposure.planning.order.replace("random", ""),
                "a batch is planned in random order",
                "random",
            ),
            "max_latent_frames": (
                self.max_latent_frames,
                "the bank holds latents of the length that is wanted",
                "null",
            ),
        }
        for name, (given, why, fix) in refused.items():
            if given:
                raise ConfigError(
                    f"{name} {given} cannot be had from a bank",
                    where=f"model.init_args.{name}",
                    why=why,
                    fix=f"set it to {fix}, or train with bernini.cotraining.module.CoTrainingModule",
                )
        self.cuda_graphs = cuda_graphs
        self._passes: list[Callable[[Tensor], Tensor]] = []  # a list keeps it out of the module's weights

    def on_train_start(self) -> None:
        """Begin to gather losses."""
        super().on_train_start()
        self._sums = torch.zeros(len(NAMES), len(SUMS), device=self.device)

    @property
    def _bank(self) -> CoBank:
        return self.trainer.datamodule.bank  # type: ignore[attr-defined]

    def _train(self, stages: list[Stage]) -> None:
        """As the parent; what was recorded of another stage is forgotten."""
        super()._train(stages)
        self._passes.clear()

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:  # type: ignore[override]
        """One pass; the losses weigh every hidden token, every label and every target alike."""
        if not self._passes:
            self._passes.append(self._record(self._bank))
        key = self.global_step, batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(draw_seed(self.seed, "train", *key))
        rows = batch.rows.to(self.device, non_blocking=True)
        sums = self._passes[0](rows)
        self._sums.index_add_(0, self._bank.plans.task[self._bank.numbers(rows)].int(), sums.detach())
        return self.weigh(sums)

    def weigh(self, sums: Tensor) -> Tensor:
        """The loss, from ``[B, 9]`` `bernini.cotraining.passing.SUMS` of a batch."""
        found = dict(zip(SUMS, sums.sum(0), strict=True))
        ntp, visual, dit = (
            found[loss] / found[count].clamp(min=1e-6)
            for loss, count in (("ntp", "labels"), ("visual", "hidden"), ("dit", "rendered"))
        )
        experts = len(self.renderer.models)  # whose losses add up
        return self.loss.ntp * ntp + self.loss.visual * visual + self.loss.dit * experts * dit

    def _trained_means(self) -> dict[str, Tensor]:
        """Means of all samples since the last call."""
        add_sums(self._trained, self._sums[:, : len(PLAN_SUMS)])
        dit, rendered = self._sums[:, len(PLAN_SUMS) :].unbind(1)
        rows = [("dit", f"dit_{task}") if task in TASKS else () for task in NAMES]
        self._trained.add(dit, rows, rendered.tolist())
        self._sums = torch.zeros_like(self._sums)
        # The progress bar waits for what it shows, so that it gets no more than the loggers.
        means = super()._trained_means()
        self.log("train/loss", means["loss"], prog_bar=True, logger=False, batch_size=1)
        return means

    def make_pass(self, bank: CoBank) -> CoTrainingPass:
        """What a step of this stage runs."""
        with torch.autocast(self.device.type, enabled=False):
            plans = PlanPass(
                self.planner,
                bank.plans,
                bank.batch_size,
                draw_ratios(self.loss, self.seed).to(self.device),
                [getattr(self.dropout, coin) for coin in COINS],
                self.template.vision,
                self.sources,
            )
        wanted = self._wanted(train=True)
        experts = experts_of(self.expert) if "dit" in wanted else {}
        return CoTrainingPass(
            plans,
            bank,
            {name: self.renderer.models[name] for name in experts},
            {
                name: draw_levels(self.noise, bank.clips.stacks, expert, self.seed).to(self.device)
                for name, expert in experts.items()
            },
            self.codec,
            self.exposure,
            visual="visual" in wanted,
            drops_sources=self.dropout.image > 0 or self.dropout.video > 0,
        )

    def _record(self, bank: CoBank) -> Callable[[Tensor], Tensor]:
        one = self.make_pass(bank)
        if not (self.device.type == "cuda" and self.cuda_graphs):
            return one
        return record(one, self.planner, bank.batch_size, compile=self.compile_blocks)

"""Planner training from a bank of written samples, for planners whose kernels are slower to launch than to run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bernini.attention import has_varlen
from bernini.bank import Bank, Rows
from bernini.errors import ConfigError
from bernini.means import MeanTable
from bernini.planner.bank import COINS, NAMES, PlanStack, statistics, to_patches
from bernini.planner.flow_head import Draws
from bernini.planner.learning import LossConfig, whole_text
from bernini.planner.masking import MASK_RATIOS, TEXT, UNIFORM, SourceAttention, draw_shares, visible
from bernini.planner.mllm import HiddenStates, run_text
from bernini.planner.model import PlannerModel
from bernini.planner.module import PlannerModule
from bernini.planner.template import IGNORED
from bernini.planner.tower import layout
from bernini.planner.vision import VisionConfig
from bernini.seeds import draw_seed
from bernini.tasks import TASKS

SHARES = 8192  # mask ratios drawn ahead for each task, of which a step takes its own
AT_ONCE = 4096  # frames that the tower sees together

SUMS = ("visual", "hidden", "ntp", "right", "labels", "answers", "asked")
"""What is summed over a sample: loss and number of hidden tokens; loss of labels, right ones, their number; whole right
answers and answers, 0 or 1."""
MEANS = {
    "visual": ("visual", "hidden"),
    "ntp": ("ntp", "labels"),
    "accuracy": ("right", "labels"),
    "answers": ("answers", "asked"),
}
"""What is logged: one sum over another."""


@dataclass(frozen=True)
class Sheets:
    """B written samples as the planner reads them; see `bernini.planner.bank.PlanStack`.

    Attributes:
        ids: ``[B, L]``.
        token_type: ``[B, L]``.
        segment_id: ``[B, L]``.
        position_ids: ``[B, L, 3]``.
        shows: ``[B, L]``.
        length: ``[B]``.
        targets: ``[B, N]``.
        count: ``[B]``.
        labelled: ``[B, A]``.
        labels: ``[B, A]``.
    """

    ids: Tensor
    token_type: Tensor
    segment_id: Tensor
    position_ids: Tensor
    shows: Tensor
    length: Tensor
    targets: Tensor
    count: Tensor
    labelled: Tensor
    labels: Tensor

    def hidden(self, masked: Tensor) -> Tensor:
        """Bool ``[B, L]``, tokens that are hidden, from ``masked [B, N]``, which target tokens are."""
        return torch.zeros_like(self.token_type, dtype=torch.bool).scatter(1, self.targets, masked)


class PlanPass(nn.Module):
    """From rows of a bank to the losses of every sample, in calls whose shapes never change.

    Args:
        planner: The planner. Its tower runs in every pass if it is trained, else once, now.
        stack: The samples, on the planner's device.
        batch_size: Samples of a batch.
        shares: ``[tasks, SHARES]`` drawn mask ratios of the tasks in `NAMES`.
        rates: Rates at which the coins of a sample fall, those of `COINS` first.
        vision: How frames become patches.
        sources: Attention among the tokens of a source.
    """

    def __init__(
        self,
        planner: PlannerModel,
        stack: PlanStack,
        batch_size: int,
        shares: Tensor,
        rates: Sequence[float],
        vision: VisionConfig,
        sources: SourceAttention,
    ) -> None:
        super().__init__()
        self.planner = planner
        planner.vit_decoder.config.chunk = None  # chunks want tokens that all weigh alike
        self._stack, self._shares = stack, shares
        device = stack.task.device
        self._rates = torch.tensor(rates, device=device)
        self._statistics = statistics(vision, device)  # here, as no graph records what comes from the host
        self._bits = 2 ** torch.arange(len(COINS), device=device)
        self._slots = torch.arange(stack.targets.shape[1], device=device)
        self._visible = torch.vmap(partial(visible, sources=sources))
        self._features: Tensor | None = None
        if any(p.requires_grad for p in planner.tower.parameters()):
            self._layout = self._lay_out(batch_size * stack.own.shape[1])
        else:
            self._features = self._embed()

    def forward(self, rows: Tensor) -> Tensor:
        """The losses of samples ``rows [B]`` under what `draw` draws: ``[B, 7]`` fp32 `SUMS`."""
        return self.measure(rows, *self.draw(rows))

    def draw(self, rows: Tensor) -> tuple[Tensor, Tensor, Draws]:
        """Draw what dropout leaves of samples, what is hidden of it, and noises.

        Args:
            rows: ``[B]`` samples.

        Returns:
            What `measure` takes.
        """
        variant = self.variant(rows, self.throw(rows))
        masked = self.hide(rows)
        return variant, masked, self.planner.vit_decoder.draw(masked.numel(), device=rows.device)

    def throw(self, rows: Tensor) -> Tensor:
        """Throw the coins of samples: bool ``[B, coins]``."""
        return torch.rand(len(rows), len(self._rates), device=rows.device) < self._rates

    def variant(self, rows: Tensor, lost: Tensor) -> Tensor:
        """The rows among the variants ``[B]`` of samples that have ``lost [B, 3]``, a bool for each of `COINS`."""
        return self._stack.variants[rows, (lost * self._bits).sum(1)].long()

    def hide(self, rows: Tensor) -> Tensor:
        """Draw which target tokens of samples are hidden: bool ``[B, N]``."""
        stack, device = self._stack, rows.device
        share = self._shares[stack.task[rows].long(), torch.randint(SHARES, rows.shape, device=device)]
        count = stack.count[rows, None]
        hidden = (count * share[:, None]).ceil().clamp(min=1)
        return (self.shuffle(rows) < hidden) & (self._slots < count)

    def shuffle(self, rows: Tensor) -> Tensor:
        """Draw an order of the target tokens of samples: ``[B, N]``, the place of each; what is missing comes last."""
        missing = self._slots >= self._stack.count[rows, None]
        return torch.rand(missing.shape, device=rows.device).masked_fill(missing, 2.0).argsort(1).argsort(1)

    @property
    def slots(self) -> int:
        """Most target tokens N of a sample."""
        return len(self._slots)

    def measure(self, rows: Tensor, variant: Tensor, masked: Tensor, draws: Draws) -> Tensor:
        """The losses of given variants under given masks and noise.

        Args:
            rows: ``[B]`` samples.
            variant: ``[B]`` their rows among the variants.
            masked: Bool ``[B, N]``, target tokens that are hidden.
            draws: Timesteps and noises of all B N target tokens.

        Returns:
            ``[B, 7]`` fp32 `SUMS`.
        """
        sheets, features = self.sheets(rows, variant), self.see(rows)
        states = self.run(sheets, take(features, sheets.shows), masked)
        return self.weigh(sheets, states, features, masked, draws)

    def sheets(self, rows: Tensor, variant: Tensor) -> Sheets:
        """Samples ``rows [B]`` in their variants ``[B]``."""
        stack = self._stack
        return Sheets(
            **{name: getattr(stack, name)[variant] for name in ("ids", "token_type", "segment_id", "position_ids")},
            **{name: getattr(stack, name)[variant].long() for name in ("shows", "length", "targets")},
            count=stack.count[rows].long(),
            **{name: getattr(stack, name)[variant].long() for name in ("labelled", "labels")},
        )

    def run(self, sheets: Sheets, shown: Tensor, masked: Tensor) -> HiddenStates:
        """One pass of the text model.

        Args:
            sheets: The samples.
            shown: ``[B, L, D]`` what each visual's token shows, unless it is hidden.
            masked: Bool ``[B, N]``, target tokens that are hidden.
        """
        planner = self.planner
        embeds = planner.embedding(sheets.ids)
        embeds = torch.where((sheets.token_type != TEXT)[..., None], shown.to(embeds.dtype), embeds)
        hide = sheets.hidden(masked)
        embeds = torch.where(hide[..., None], planner.mask_tokens[0, 0].to(embeds.dtype), embeds)
        mask = self._visible(sheets.token_type, sheets.segment_id)
        positions = sheets.position_ids.long().movedim(-1, 0)
        return run_text(planner.text, embeds, positions, mask, final=True)

    def weigh(
        self, sheets: Sheets, states: HiddenStates, features: Tensor, masked: Tensor, draws: Draws | None
    ) -> Tensor:
        """The losses ``[B, 7]`` fp32 `SUMS` of hidden states.

        Args:
            sheets: The samples.
            states: Of `run`.
            features: ``[B, tokens, D]`` ViT embeddings of the samples' frames.
            masked: Bool ``[B, N]``, target tokens that are hidden.
            draws: Timesteps and noises of all B N target tokens; null for no visual loss.
        """
        assert states.final is not None
        planner, labels = self.planner, sheets.labels
        visual, hidden = (torch.zeros(len(labels), device=labels.device) for _ in range(2))
        if draws is not None:
            condition = planner.connector.for_vit(take(states.penultimate, sheets.targets).flatten(0, 1))
            truth = take(features.detach(), sheets.shows.gather(1, sheets.targets)).flatten(0, 1)
            error = planner.vit_decoder.loss(condition, truth, draws).view_as(masked)
            visual, hidden = (error * masked).sum(1), masked.sum(1)

        logits = planner.mllm.lm_head(take(states.final, sheets.labelled)).float()
        ntp = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
        right, known = (logits.argmax(-1) == labels).sum(1), (labels != IGNORED).sum(1)
        answers = (right == known) & (known > 0)
        counts = (hidden, ntp.view_as(labels).sum(1), right, known, answers, known > 0)
        return torch.stack([visual, *(x.float() for x in counts)], dim=1)

    def see(self, rows: Tensor) -> Tensor:
        """ViT embeddings ``[B, tokens, D]`` of the frames of samples."""
        own = self._stack.own[rows]
        if self._features is not None:
            return self._features[own].flatten(1, 2)
        return self._run_tower(self._stack.frames[own.flatten()], self._layout).unflatten(0, (len(rows), -1))

    @torch.no_grad()
    def _embed(self) -> Tensor:
        """ViT embeddings ``[F, T, D]`` of all frames."""
        parts = [
            self._run_tower(frames, self._lay_out(len(frames))).unflatten(0, (len(frames), -1))
            for frames in self._stack.frames.split(AT_ONCE)
        ]
        return torch.cat(parts)

    def _run_tower(self, frames: Tensor, arrangement: dict[str, Any]) -> Tensor:
        """ViT embeddings ``[n T, D]`` of frames ``[n, P, C]``: a clip's see each other as little as other images do."""
        return self.planner.tower(to_patches(frames, self._statistics).flatten(0, 1), **arrangement).pooler_output

    def _lay_out(self, frames: int) -> dict[str, Any]:
        grids, device = [(1, *self._stack.grid)] * frames, self._stack.task.device
        return {
            "grid_thw": torch.tensor(grids, device=device),
            **layout(grids, self.planner.tower.config, device),
        }


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, k, D]`` of ``x [B, n, D]`` at ``index [B, k]``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class BankedPlannerModule(PlannerModule):
    """A `PlannerModule` that trains from the bank of its data module, forward and backward as CUDA graphs.

    The losses are the parent's: what dropout leaves of a sample was written by the template as well. Validation and
    planning are the parent's.

    Args:
        *args: As `PlannerModule`.
        cuda_graphs: Record forward and backward as CUDA graphs, on CUDA.
        compile: Compile the blocks that the graphs are recorded of.
        **kwargs: As `PlannerModule`.
    """

    def __init__(self, *args: Any, cuda_graphs: bool = True, compile: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.recompute != "none":
            raise ConfigError(
                "nothing can be recomputed here",
                where="model.init_args.recompute",
                why="a CUDA graph records no second forward pass",
                fix="set it to none, or train with bernini.planner.module.PlannerModule",
            )
        self.cuda_graphs, self.compile_blocks = cuda_graphs, compile
        self._passes: list[Callable[[Tensor], Tensor]] = []

    def on_train_start(self) -> None:
        """Begin to gather losses."""
        super().on_train_start()
        self._sums = torch.zeros(len(NAMES), len(SUMS), device=self.device)

    @property
    def _bank(self) -> Bank[PlanStack]:
        return self.trainer.datamodule.bank  # type: ignore[attr-defined]

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:  # type: ignore[override]
        """One pass; the loss weighs every hidden token and every label alike."""
        if not self._passes:
            self._passes.append(self._record(self._bank))
        key = self.global_step, batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(draw_seed(self.seed, "train", *key))
        rows = batch.rows.to(self.device, non_blocking=True)
        sums = self._passes[0](rows)
        self._sums.index_add_(0, self._bank.stacks[0].task[rows].int(), sums.detach())
        visual, hidden, ntp, _, labels, *_ = sums.sum(0)
        return self.loss.ntp * ntp / labels.clamp(min=1e-6) + self.loss.visual * visual / hidden.clamp(min=1e-6)

    def _trained_means(self) -> dict[str, Tensor]:
        """Means of all samples since the last call."""
        add_sums(self._trained, self._sums)
        self._sums = torch.zeros_like(self._sums)
        # The progress bar waits for what it shows, so that it gets no more than the loggers.
        means = super()._trained_means()
        self.log("train/loss", means["loss"], prog_bar=True, logger=False, batch_size=1)
        return means

    def _record(self, bank: Bank[PlanStack]) -> Callable[[Tensor], Tensor]:
        (stack,) = bank.stacks
        with torch.autocast(self.device.type, enabled=False):
            one = PlanPass(
                self.planner,
                stack,
                bank.batch_size,
                draw_ratios(self.loss, self.seed).to(self.device),
                [getattr(self.dropout, coin) for coin in COINS],
                self.template.vision,
                self.sources,
            )
        if not (self.device.type == "cuda" and self.cuda_graphs):
            return one
        return record(one, self.planner, bank.batch_size, compile=self.compile_blocks)


def record(one: nn.Module, planner: PlannerModel, batch_size: int, compile: bool) -> Callable[[Tensor], Tensor]:
    """Record forward and backward of a pass with a planner as CUDA graphs.

    Args:
        one: Takes rows ``[batch_size]`` of a bank on the device.
        planner: The planner.
        batch_size: Samples of a batch.
        compile: Compile the planner's blocks for it.

    Raises:
        ConfigError: The vision tower is trained, and cannot be recorded.
    """
    device, config = planner.mask_tokens.device, planner.tower.config
    half, precision = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    trained = any(p.requires_grad for p in planner.tower.parameters())
    if trained and not has_varlen(device, precision if half else torch.float32, config.hidden_size // config.num_heads):
        raise ConfigError(
            "the vision tower cannot be trained in CUDA graphs here",
            where="trainer.precision",
            why="its attention waits for the device, except in half precision with heads of a multiple of 8",
            fix="trainer.precision: bf16-mixed, or model.init_args.cuda_graphs: false",
        )
    rows = torch.zeros(batch_size, dtype=torch.long, device=device)
    # A cache of cast weights would outlive the graph that made it.
    with (
        compiled(planner.blocks if compile else ()),
        torch.autocast("cuda", precision, enabled=half, cache_enabled=False),
    ):
        return cast(Callable[[Tensor], Tensor], torch.cuda.make_graphed_callables(one, (rows,)))


def add_sums(table: MeanTable, sums: Tensor) -> None:
    """Add `SUMS` ``[tasks, 7]`` of the tasks in `NAMES` to a table of means; this waits for the device."""
    named = dict(zip(SUMS, sums.T, strict=True))
    for name, (value, count) in MEANS.items():
        table.add(named[value], [_names(name, task) for task in NAMES], named[count].tolist())


def _names(mean: str, task: str) -> tuple[str, ...]:
    """Names under which a mean of `MEANS` is logged for a task."""
    if mean == "answers":
        return (whole_text(task),)
    return (mean, f"visual_{task}") if mean == "visual" and task in TASKS else (mean,)


def draw_ratios(loss: LossConfig, seed: int) -> Tensor:
    """Mask ratios ``[tasks, SHARES]`` in fp64 of the tasks in `NAMES`."""
    ratios = [MASK_RATIOS.get(task, UNIFORM) if loss.ratios == "beta" else UNIFORM for task in NAMES]
    generator = torch.Generator().manual_seed(draw_seed(seed, "ratios"))
    return torch.stack([draw_shares(SHARES, ratio, generator) for ratio in ratios])


@contextmanager
def compiled(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Have blocks compiled for a while: validation, whose shapes vary, would compile them again and again."""
    for block in blocks:
        block.compile(dynamic=False)
    yield
    for block in blocks:
        block._compiled_call_impl = None

"""A benchmark during training and validation."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from benchmarks.quality.environment import environment
from benchmarks.quality.folder import JUDGE, MANIFEST, RunFolder, Shard, describe, reason
from benchmarks.quality.generating import batches, produce
from benchmarks.quality.interface import Benchmark, Cell, Item, asked, coverage, is_comparable, subset, without
from benchmarks.quality.judge_config import JudgeConfig
from benchmarks.quality.records import Records
from benchmarks.quality.sampler import Trained, sampling_facts
from benchmarks.quality.scoring import append_scores, judge_file
from benchmarks.quality.summary import summarise, write_summary
from benchmarks.quality.tables import write_inputs
from bernini.cotraining.module import CoTrainingModule
from bernini.errors import ConfigError
from bernini.renderer.module import RendererModule
from bernini.ulysses import apart
from callbacks.ema import EMA, best_weights

log = logging.getLogger(__name__)


class BenchmarkCallback(L.Callback):
    """Scores the moving average on a benchmark every so many steps, at the end of training and of ``bernini validate``.

    Training goes on as if nothing had happened: weights, modes and random states are put back, and whatever fails in
    here is a warning and a coverage below 1. Loggers get ``bench/<name>/<task>/<metric>``, W&B also a table of all
    items with their clips.

    Args:
        benchmark: What to score on.
        folder: Where to; each time makes a run folder of its own, ``step-000500`` or ``validate``.
        every_n_steps: Optimizer steps between two times.
        limit: Items, always the same ones, as evenly over the tasks as can be; null takes all. Figures of a part do not
            compare with those of the whole, and are marked so.
        batch_size: Items of one task that a rank samples together.
        judge: Who judges outputs, of a benchmark that is judged; null leaves those scores out. Each rank asks about its
            own outputs; a local judge is loaded beside the model each time. Names of the scores in loggers end with the
            hash of the judge's settings, ``bench/<name>/<task>/<metric>/judge-<hash>``.
        judge_minutes: Training waits no longer for the judge, but for answers that are on the way; what then has no
            answer lowers the coverage.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        folder: str,
        every_n_steps: int = 1000,
        limit: int | None = 96,
        batch_size: int = 16,
        judge: JudgeConfig | None = None,
        judge_minutes: float = 10.0,
    ) -> None:
        if min(every_n_steps, batch_size) < 1 or (limit is not None and limit < 1) or judge_minutes <= 0:
            raise ConfigError(
                "every_n_steps, batch_size and limit are 1 or more, judge_minutes above 0", where="BenchmarkCallback"
            )
        if judge is not None:
            judge.check(benchmark)
        self.benchmark, self.folder = benchmark, Path(folder)
        self.every_n_steps, self.limit, self.batch_size = every_n_steps, limit, batch_size
        self.judge, self.judge_minutes = judge, judge_minutes
        self._judged = judge.inquiry(benchmark).scores if judge is not None else ()
        self._last = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the items."""
        every = self.benchmark.items()
        self._of, self._items = len(every), subset(every, self.limit)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from where the run stands."""
        self._last = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Score every n steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._score_step(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score what came out."""
        self._score_step(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score what `bernini validate` was given; the average, if there is one, is in place until validation ends."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._score(trainer, pl_module, self.folder / "validate", nullcontext())

    def _score_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if step != self._last:  # several batches share a step when gradients are accumulated
            self._last = step
            self._score(trainer, pl_module, self.folder / f"step-{step:06d}", best_weights(trainer, pl_module))

    @isolate_rng()
    def _score(
        self, trainer: L.Trainer, module: L.LightningModule, root: Path, weights: AbstractContextManager[None]
    ) -> None:
        assert isinstance(module, RendererModule | CoTrainingModule)
        folder = RunFolder(root, Shard(trainer.global_rank, trainer.world_size))
        # Every rank gets to every point at which ranks wait for each other, whatever fails on its way.
        ready = False
        with _surviving("the folder cannot be used"):
            if trainer.is_global_zero:
                self._start(trainer, module, folder)
                ready = True
        ready = trainer.strategy.broadcast(ready)
        scored: list[tuple[str, str, float | None]] = []
        with _modes_kept(module), weights, apart(module.renderer.models.values()):
            module.eval()
            sampler = Trained(module)
            for batch in batches(_share(self._items, folder.shard) if ready else [], self.batch_size):
                with _surviving("a batch failed"):
                    folder.generated.append(produce(self.benchmark, batch, sampler, folder, module.sampling.seed))
                    scorable = [item for item in asked(batch, self.benchmark.measured()) if item.metrics]
                    results = [judge_file(self.benchmark, folder.root, item) for item in scorable]
                    append_scores(folder, results)
                    for item, found in results:
                        scored += [(item.id, k, v) for k, v in found.items()] if isinstance(found, dict) else []
        scored += self._ask(folder, module.device) if ready and self.judge is not None else []
        records = Records(self.benchmark, asked(self._items, self._scores()))
        records.to(module.device if trainer.world_size > 1 else "cpu")
        records.update(scored)
        cells = records.compute()
        trainer.strategy.barrier()  # all ranks' rows are written
        if trainer.is_global_zero:
            self._tell(trainer, folder, cells)

    def _scores(self) -> tuple[str, ...]:
        """Names of the scores that items get here."""
        return (*self.benchmark.measured(), *self._judged)

    def _ask(self, folder: RunFolder, device: torch.device) -> list[tuple[str, str, float | None]]:
        """Have this rank's outputs judged; gives item, name and value of each score."""
        assert self.judge is not None
        own = [item for items in _by_task(self._items) for item in folder.shard.of(items)]
        try:
            seconds = self.judge_minutes * 60
            judged = self.judge.score(self.benchmark, own, folder, self.judge.judge(device), seconds=seconds)
        except Exception as error:
            log.warning("benchmark: the judge cannot be asked: %s", reason(error), exc_info=True)
            with _surviving("a failure cannot be noted"):
                for score in self._judged:
                    rows = [{"id": i.id, "failed": reason(error)} for i in own if score in i.metrics]
                    folder.scores(score).append(rows)
            return []
        return [(one, name, value) for one, row in judged.values().items() for name, value in row.items()]

    def _tell(self, trainer: L.Trainer, folder: RunFolder, cells: Sequence[Cell]) -> None:
        """Write the summary and log the figures."""
        for logger in trainer.loggers:
            with _surviving("a logger failed"):
                heads = self._heads(folder)
                scalars = {f"{c.task}/{heads[c.metric]}": c.value for c in cells if c.value is not None}
                scalars["coverage"] = coverage(cells)
                existing = without(self._items, folder.void(self._scores()))
                scalars["comparable"] = float(is_comparable(cells, existing, self._of))
                named = {f"bench/{self.benchmark.name}/{key}": value for key, value in scalars.items()}
                logger.log_metrics(named, trainer.global_step)
        with _surviving("the summary cannot be written"):
            write_summary(folder, summarise(self.benchmark, self._items, self._scores(), cells, folder))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                with _surviving("W&B got no table"):
                    self._log_table(logger, folder, trainer.global_step)

    def _start(self, trainer: L.Trainer, module: RendererModule | CoTrainingModule, folder: RunFolder) -> None:
        """An empty folder with a manifest: a run that is trained again is scored again. What a judge said stays."""
        said = (folder.root / JUDGE).parent
        kept = folder.root.with_name(f"{folder.root.name}-{said.name}")
        if said.is_dir():
            said.rename(kept)
        if (folder.root / MANIFEST).is_file():
            shutil.rmtree(folder.root)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averaged = any(isinstance(callback, EMA) for callback in callbacks)
        model = {"step": trainer.global_step, "weights": "moving average" if averaged else "live"}
        tasks = list(dict.fromkeys(item.task for item in self._items))
        planned = isinstance(module, CoTrainingModule)
        sampling = {**sampling_facts(module.sampling, tasks, planned), "text_rows": module.text.rows}
        if isinstance(module, CoTrainingModule):
            sampling["planning"] = asdict(module.planning)
        facts = {"model": model, "sampling": sampling}
        identity = {**describe(self.benchmark, self._items, self._of), **facts}
        folder.start(identity, environment(), self.benchmark.located())
        if kept.is_dir():
            kept.rename(said)
            (folder.root / JUDGE).unlink(missing_ok=True)

    def _heads(self, folder: RunFolder) -> dict[str, str]:
        """What each score is called in a logger: scores of two judges, rubrics or rules never share a name."""
        told = folder.judge()
        by = f"/judge-{told['column'].rpartition('#')[2]}" if told else ""
        return {name: name + by * (name in self._judged) for name in self._scores()}

    def _log_table(self, logger: WandbLogger, folder: RunFolder, step: int) -> None:
        """One row an item, with its first source, the target and the output by path."""
        import wandb

        metrics, heads = self._scores(), self._heads(folder)
        values = folder.values(metrics)
        columns = [f"{shown} {kind}" for shown in ("source", "target", "output") for kind in ("clip", "image")]
        rows = []
        for item in self._items:
            inputs = dict(write_inputs(self.benchmark, item, self.folder / "inputs"))
            first = next((path for label, path in inputs.items() if label.startswith("source")), None)
            files = {"source": first, "target": inputs.get("target"), "output": folder.output(self.benchmark, item)}
            media: dict[str, Any] = dict.fromkeys(columns)  # a column of W&B takes clips or images, not both
            for shown, path in files.items():
                if path is not None and path.is_file():
                    clip = path.suffix == ".mp4"
                    made = wandb.Video(str(path), format="mp4") if clip else wandb.Image(str(path))
                    media[f"{shown} {'clip' if clip else 'image'}"] = made
            scores = [values.get((item.id, metric)) for metric in metrics]
            rows.append([item.id, item.task, item.category, item.prompt, *media.values(), *scores])
        names = ["id", "task", "category", "prompt", *columns, *heads.values()]
        logger.log_table(f"bench/{self.benchmark.name}/items", names, rows, step=step)


def _by_task(items: Sequence[Item]) -> list[list[Item]]:
    """The items of each task."""
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(item)
    return list(by_task.values())


def _share(items: Sequence[Item], shard: Shard) -> list[Item]:
    """A rank's items: of each task as many as every other rank has, as a sharded model demands.

    Where a task's items run out, its first ones come again; scores of one item count once.
    """
    padded = ((own, -(-len(own) // shard.count) * shard.count) for own in _by_task(items))
    return [own[i % len(own)] for own, total in padded for i in range(shard.index, total, shard.count)]


@contextmanager
def _modes_kept(module: torch.nn.Module) -> Iterator[None]:
    """Put every part back into the mode, training or not, that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _surviving(what: str) -> Iterator[None]:
    """Training is worth more than a benchmark: turn any error into a warning."""
    try:
        yield
    except Exception as error:
        log.warning("benchmark: %s: %s: %s", what, type(error).__name__, error, exc_info=True)

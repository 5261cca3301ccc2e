"""Sampled clips as MP4 files, during training and from `bernini predict`."""

import json
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import WandbLogger
from torch.distributed import all_gather_object

from bernini.conversation import Conversation
from bernini.cotraining.module import CoTrainingModule
from bernini.media import restore, write_image, write_video
from bernini.renderer.module import RendererModule
from bernini.renderer.rendering import Prediction
from bernini.sharding import data_rank, leads
from callbacks.ema import best_weights


def write_prediction(prediction: Prediction, folder: Path) -> dict[str, Any]:
    """Write what was sampled, at the size, rate and length of the clip that it was made from.

    Returns:
        A row that describes it: key, task, prompt and file.
    """
    conversation = prediction.conversation
    clips = [m.media for m in [*conversation.sources, *conversation.targets] if m.is_video and m.media]
    folder.mkdir(parents=True, exist_ok=True)
    pixels = prediction.pixels.cpu()
    if clips and clips[0].source and conversation.spec.target == "video":
        pixels = restore(pixels, clips[0].source)
    if pixels.shape[1] == 1:
        path = folder / f"{conversation.key}.png"
        write_image(path, pixels)
    else:
        path = folder / f"{conversation.key}.mp4"
        fps = (clips[0].source.get("fps") or clips[0].fps) if clips else 16.0
        write_video(path, pixels, fps or 16.0)
    return {"key": conversation.key, "task": conversation.task, "prompt": conversation.prompt, "file": path.name}


class PredictionWriter(BasePredictionWriter):
    """Writes every prediction and a ``predictions.jsonl`` beside them.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: str) -> None:
        super().__init__("batch")
        self.folder = Path(folder)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Sequence[Prediction],
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch."""
        if not leads(pl_module):
            return
        rows = [write_prediction(p, self.folder) for p in prediction]
        rank, ranks = data_rank(pl_module)
        name = "predictions.jsonl" if ranks == 1 else f"predictions-{rank}.jsonl"
        with (self.folder / name).open("w" if batch_idx == 0 else "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


class SampleVideos(L.Callback):
    """Samples the same validation clips before training and every so many steps: ``folder/step-000000/`` and W&B.

    Randomness comes from the sampler's own seeds, so training goes on as if nothing had been sampled.

    Args:
        folder: Where to.
        every_n_steps: Optimizer steps between samples.
        count: How many clips, the first ones of the validation data.
    """

    def __init__(self, folder: str, every_n_steps: int = 500, count: int = 4) -> None:
        self.folder, self.every_n_steps, self.count = Path(folder), every_n_steps, count
        self._sampled = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What the weights could do before this run."""
        self._sample(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample every n steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What the weights can do now."""
        self._sample(trainer, pl_module)

    def _sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RendererModule | CoTrainingModule)
        step = trainer.global_step
        if step == self._sampled:
            return
        self._sampled = step
        training = pl_module.training
        pl_module.eval()
        with best_weights(trainer, pl_module):
            predictions = pl_module.sample([c.to(pl_module.device) for c in self._clips(trainer, pl_module)])
        pl_module.train(training)
        folder = self.folder / f"step-{step:06d}"
        shown = [p for p in predictions if leads(pl_module) and not p.conversation.info.get("padding")]
        rows = of_all_ranks(trainer, [write_prediction(p, folder) for p in shown])
        if trainer.is_global_zero:
            show(trainer, folder, rows, {".mp4": "samples", ".png": "sample_images"})

    def _clips(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[Conversation]:
        """This rank's share of the first validation clips; every rank has as many, as a sharded model demands."""
        _, ranks = data_rank(pl_module)
        share = -(-self.count // ranks)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        return list(islice(chain.from_iterable(b.samples for b in datamodule.val_dataloader()), share))


def of_all_ranks(trainer: L.Trainer, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of every rank, whose files are written by then."""
    if trainer.world_size == 1:
        return rows
    gathered: list[Any] = [None] * trainer.world_size
    all_gather_object(gathered, rows)
    return list(chain.from_iterable(gathered))


def show(trainer: L.Trainer, folder: Path, rows: list[dict[str, Any]], names: dict[str, str]) -> None:
    """Show files in W&B, which copies them, under what they were asked to show.

    Args:
        trainer: Whose loggers are told.
        folder: Where the files lie.
        rows: Key, prompt and file of each.
        names: What files are logged as, by suffix.
    """
    captions = {str(folder / row["file"]): f"{row['key']}: {row['prompt']}" for row in rows}
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            for suffix, name in names.items():
                log = logger.log_video if suffix == ".mp4" else logger.log_image
                if files := sorted(file for file in captions if file.endswith(suffix)):
                    log(name, files, trainer.global_step, caption=[captions[file] for file in files])

"""What the tests of the data order share: small shards, and a model that remembers what it trained on."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch

from bernini.conversation import Batch, Conversation, Media, Message
from datamodules import VideoDataModule
from datamodules.shards import write_shards


def samples(count: int, task: str = "t2i", prefix: str = "s") -> Iterator[Conversation]:
    """Images of 16 x 16 pixels, whose keys say where they come from and which they are."""
    for number in range(count):
        pixels = torch.full((3, 1, 16, 16), number % 256, dtype=torch.uint8)
        messages = [Message("text", text=f"{number}"), Message("image_gen", media=Media(pixels=pixels))]
        yield Conversation(task, messages, key=f"{prefix}{number:03d}")


def make_shards(folder: Path, count: int, task: str = "t2i", prefix: str = "s", samples_per_shard: int = 5) -> str:
    """A folder with so many of these images."""
    write_shards(samples(count, task, prefix), folder, samples_per_shard=samples_per_shard)
    return str(folder)


class Recorder(L.LightningModule):
    """A real model that remembers the keys of its batches, and writes them to a file per rank if asked to."""

    def __init__(self, log: Path | None = None) -> None:
        super().__init__()
        self.net, self.log_file = torch.nn.Linear(1, 1), log
        self.rows: list[dict[str, Any]] = []

    @property
    def trained(self) -> list[list[str]]:
        return keys_in(self.rows)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self._step(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(batch)

    test_step = predict_step = validation_step

    def _step(self, batch: Batch) -> torch.Tensor:
        stage = self.trainer.state.stage.value  # type: ignore[union-attr]
        padding = [bool(s.info.get("padding")) for s in batch.samples]
        self.rows.append({"stage": stage, "keys": [s.key for s in batch.samples], "padding": padding})
        if self.log_file:
            with self.log_file.with_suffix(f".{self.global_rank}").open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        mean = torch.stack([next(s.media()).pixels.float().mean() for s in batch.samples]).mean()
        return self.net(mean.view(1, 1)).square().mean()

    def configure_optimizers(self) -> Any:
        """As many do: a schedule over all steps, for which Lightning has to ask the loaders for their length."""
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-9)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-9, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def keys_in(rows: Iterable[dict[str, Any]], stage: str = "train") -> list[list[str]]:
    """Keys of the batches of a stage."""
    return [row["keys"] for row in rows if row["stage"] == stage]


def read_rows(log: Path, rank: int = 0) -> list[dict[str, Any]]:
    """What a `Recorder` wrote on a rank."""
    return [json.loads(line) for line in log.with_suffix(f".{rank}").read_text().splitlines()]


class StopAfter(L.Callback):
    """Ends training after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.left -= 1
        trainer.should_stop = self.left <= 0


def make_trainer(**kwargs: Any) -> L.Trainer:
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    defaults |= {"enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return L.Trainer(**(defaults | kwargs))


def attach(data: VideoDataModule, rank: int = 0, world: int = 1, accumulate: int = 1) -> VideoDataModule:
    """A data module as it is on one of several ranks, ready to train, without the other ranks."""
    kwargs = {"rank": rank, "num_replicas": world}
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=kwargs, accumulate_grad_batches=accumulate)  # type: ignore[assignment]
    data.setup("fit")
    return data

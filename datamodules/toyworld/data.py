"""ToyWorldDataModule: toy samples drawn as they are needed, without shards."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bernini.conversation import Batch, Conversation
from bernini.errors import ConfigError
from bernini.planner.vision import VisionConfig, add_visuals
from datamodules.loading import Loader
from datamodules.order import Request, eval_requests
from datamodules.resuming import OrderedDataModule
from datamodules.toyworld.items import Split, make_item
from datamodules.toyworld.questions import QUESTIONS, make_question

GOLDEN = (sqrt(5) - 1) / 2


@dataclass(frozen=True)
class ToyWorld:
    """An endless list of toy samples, each a pure function of its number.

    Attributes:
        parts: Part of each task in the mix, in any unit; any run of samples holds the tasks in nearly these parts.
            Besides the tasks of the task table there are those of `QUESTIONS`, which only a planner can learn.
            ``v2v/reason`` is v2v with edits of the kind ``reason`` alone, ``v2v/cot`` the same with the reasoning.
        frames: Frames of a clip.
        height: In pixels.
        width: In pixels.
        seed: Seed of the world.
        split: ``train`` or ``held_out``.
        edits: Edit kinds, all by default; see `make_item`.
    """

    parts: Mapping[str, float]
    frames: int = 17
    height: int = 64
    width: int = 64
    seed: int = 0
    split: Split = "train"
    edits: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not sum(self.parts.values()) > 0 or min(self.parts.values()) < 0:
            raise ConfigError(
                f"no mix can be made of {dict(self.parts)}",
                where="tasks",
                why="parts are at least 0 and one is above 0",
            )

    def __getitem__(self, index: int) -> Conversation:
        """Draw sample ``index``.

        Raises:
            ConfigError: A task is unknown or does not know the edit kinds.
        """
        # Multiples of the golden ratio spread evenly over the unit interval, which is cut in proportion to the parts.
        at = index * GOLDEN % 1 * sum(self.parts.values())
        part = next(name for name, end in zip(self.parts, accumulate(self.parts.values()), strict=True) if at < end)
        task, _, kind = part.partition("/")
        make = make_question if task in QUESTIONS else partial(make_item, edits=[kind] if kind else self.edits)
        return make(
            task,
            index,
            seed=self.seed,
            frames=self.frames,
            height=self.height,
            width=self.width,
            split=self.split,
        )


class Batches(Dataset[Batch]):
    """Draws the samples of a request as one batch.

    Args:
        world: Where they come from.
        vision: Make what a planner with these numbers sees, too; null for nothing.
    """

    def __init__(self, world: ToyWorld, vision: VisionConfig | None = None) -> None:
        self.world, self.vision = world, vision

    def __getitem__(self, request: Request) -> Batch:
        samples = [self.world[number] for number in request.samples]
        for sample in samples[len(samples) - request.padding :]:
            sample.info["padding"] = True
        if self.vision:
            for sample in samples:
                add_visuals(sample, self.vision)
        clips = [(media, media.pixels) for sample in samples for media in sample.media() if media.pixels is not None]
        for (media, _), pixels in zip(clips, _in_one_buffer([pixels for _, pixels in clips]), strict=True):
            media.pixels = pixels
        seen = [media.visual for media, _ in clips if media.visual is not None]
        for visual, patches in zip(seen, _in_one_buffer([visual.patches for visual in seen]), strict=True):
            visual.patches = patches
        return Batch(samples, request.cursor)


def _in_one_buffer(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same as views: a worker then sends one block of shared memory instead of one per tensor."""
    if not tensors:
        return []
    buffer = torch.cat([tensor.flatten() for tensor in tensors]).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(buffer, tensors, strict=True)]


class ToyWorldDataModule(OrderedDataModule):
    """Draws toy samples on the fly: train samples for training, held-out ones for everything else.

    A drop-in for `VideoDataModule`: the order depends on the seed alone, at any number of ranks and workers, and a
    resumed run goes on with the batch after the last optimizer step of its checkpoint.

    Args:
        tasks: Task names, in equal parts, or parts by task name; ``und_img`` and ``und_vid`` are questions, and
            ``v2v/reason`` is v2v with edits of one kind alone.
        frames: Frames of a clip, 4k + 1 for the Wan VAE; images have one.
        height: In pixels, at least 32.
        width: In pixels, at least 32.
        batch_size: Samples per rank and step.
        workers: Processes that draw; 0 draws in the training process.
        seed: Seed of the world.
        length: Samples of an epoch; what does not fill a batch of all ranks is left to the next one. Every epoch has
            new samples.
        val_length: Samples of validation, testing and prediction.
        edits: Edit kinds for tasks that have a choice, all by default.
        vision: Leave beside the pixels what the vision tower of a planner takes of them. `bernini fit` gives the
            planner's own; null leaves nothing, and the training process does that work.
    """

    def __init__(
        self,
        tasks: list[str] | dict[str, float],
        frames: int = 17,
        height: int = 64,
        width: int = 64,
        batch_size: int = 32,
        workers: int = 0,
        seed: int = 0,
        length: int = 8192,
        val_length: int = 128,
        edits: list[str] | None = None,
        vision: VisionConfig | None = None,
    ) -> None:
        super().__init__(workers)
        if min(batch_size, length, val_length) < 1 or workers < 0:
            raise ConfigError("batch_size and lengths are 1 or more, workers 0 or more", where="data.init_args")
        self.batch_size, self.seed = batch_size, seed
        self.length, self.val_length, self.vision = length, val_length, vision
        parts = tasks if isinstance(tasks, dict) else dict.fromkeys(tasks, 1.0)
        self._train = ToyWorld(parts, frames, height, width, seed, "train", edits)
        self._held_out = ToyWorld(parts, frames, height, width, seed, "held_out", edits)

    def identity(self) -> dict[str, Any]:
        """Seed and hash of the world, beside the version."""
        made_from = f"{self._train}, {self.length} samples an epoch"
        fingerprint = hashlib.sha256(made_from.encode()).hexdigest()[:16]
        return {**super().identity(), "seed": self.seed, "fingerprint": fingerprint}

    def train_dataloader(self) -> Loader:
        """Training batches from the cursor to the end of its epoch.

        Raises:
            ConfigError: An epoch is shorter than a global batch, or the checkpoint is of another world.
        """
        endless = range(sys.maxsize)
        return self.train_loader(Batches(self._train, self.vision), endless, self.length, self.batch_size, self.seed)

    def val_dataloader(self) -> Loader:
        """Batches of held-out samples; those that only fill a rank's last batch have ``info["padding"]``."""
        requests = eval_requests(self.val_length, self.batch_size, *self.rank_and_world())
        return self.loader(Batches(self._held_out, self.vision), lambda: requests, len(requests), self.seed)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

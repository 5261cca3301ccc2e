"""`VideoDataModule`: batches of conversations from shards, for training, validation, test and prediction."""

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from bernini.decoding import Limits
from bernini.errors import ConfigError
from bernini.planner.vision import VisionConfig
from bernini.tasks import get_task
from datamodules.bad_samples import WatchBadSamples
from datamodules.buckets import Bounds
from datamodules.loading import Clips, Loader
from datamodules.order import Request, eval_requests, mixture, permutation, settled, train_requests
from datamodules.resuming import OrderedDataModule

Split = Literal["train", "val", "test", "predict"]
Folders = str | list[str] | None


class VideoDataModule(OrderedDataModule):
    """Batches of conversations from folders of shards that ``bernini prepare`` wrote.

    The order of training samples depends on the seed and the epoch alone. It is the same at any number of ranks and
    workers as long as ranks times ``batch_size`` is, and a resumed run goes on with the batch after the last optimizer
    step of its checkpoint. Raw clips are decoded in the workers; posteriors and text features are passed on.

    Args:
        train: Folder, or folders, with training shards.
        val: Folders with validation shards.
        test: Folders with test shards.
        predict: Folders with samples to predict; they need no targets.
        batch_size: Training samples per rank and step.
        eval_batch_size: Samples per rank and step everywhere else.
        workers: Worker processes per rank; 0 reads in the main process.
        start_method: How workers are started; null takes Python's default.
        seed: Seed of the order.
        tasks: Tasks to keep; null keeps all.
        weights: Share of each task in training, in any unit, in place of the tasks' own frequencies; a task that is
            left out is not trained.
        max_samples: Most validation, test and prediction samples; the first ones are kept.
        max_frames: Most frames of a raw clip; a longer one loses its end.
        max_edge: Longest edge of raw frames in pixels; larger ones are resized to multiples of 16.
        max_area: Most pixels of a raw frame, as 399360 for 480p; larger ones are resized, too.
        limits: What a raw file may cost before it is resized; null takes the defaults.
        max_bad_share: Largest share of training samples that may be bad, and replaced by others of their task, before
            the run stops; ten are always borne.
        vision: Have the workers make of raw clips what the vision tower of a planner takes. `bernini fit` gives the
            planner's own; null leaves that to the training process.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        workers: int = 0,
        start_method: Literal["fork", "spawn", "forkserver"] | None = None,
        seed: int = 0,
        tasks: list[str] | None = None,
        weights: dict[str, float] | None = None,
        max_samples: int | None = None,
        max_frames: int | None = None,
        max_edge: int | None = None,
        max_area: int | None = None,
        limits: Limits | None = None,
        max_bad_share: float = 0.001,
        vision: VisionConfig | None = None,
    ) -> None:
        super().__init__(workers, start_method)
        if min(batch_size, eval_batch_size) < 1 or workers < 0 or seed < 0:
            raise ConfigError("batch sizes are 1 or more, workers and seed 0 or more", where="data.init_args")
        if weights is not None and (not weights or min(weights.values()) <= 0):
            raise ConfigError("every weight must be positive", where="data.init_args.weights", fix="leave the task out")
        self.folders: dict[Split, Folders] = {"train": train, "val": val, "test": test, "predict": predict}
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.tasks, self.max_samples = tasks, max_samples
        self.weights = weights and {get_task(name).name: weight for name, weight in weights.items()}
        self.bounds, self.vision = Bounds(max_frames, max_edge, max_area, limits or Limits()), vision
        self.max_bad_share = max_bad_share
        self._resumed: dict[str, Any] | None = None
        self._clips: dict[Split, Clips] = {}

    def setup(self, stage: str) -> None:
        """Open the shards of ``fit``, ``validate``, ``test`` or ``predict``."""
        super().setup(stage)
        callbacks: list[Callback] = getattr(self.trainer, "callbacks", [])
        if stage == "fit" and not any(isinstance(callback, WatchBadSamples) for callback in callbacks):
            callbacks.append(WatchBadSamples(self.max_bad_share))
        splits: dict[str, Split] = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}
        self._open(splits[stage])
        if stage == "fit" and self.folders["val"]:
            self._open("val")

    def _open(self, split: Split) -> None:
        if split in self._clips:
            return
        folders = self.folders[split]
        if not folders:
            raise ConfigError(f"no {split} data", where=f"data.init_args.{split}", fix="name a folder of shards")
        training = split == "train"
        tasks = list(self.weights) if training and self.weights else self.tasks
        self._clips[split] = Clips(
            [folders] if isinstance(folders, str) else folders,
            tasks,
            limit=None if training else self.max_samples,
            targets=split != "predict",
            bounds=self.bounds,
            vision=self.vision,
            seed=self.seed if training else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """Cursor of the training order and what it is an order of."""
        return {**super().state_dict(), **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved cursor; whether it fits the data is looked at when training begins."""
        super().load_state_dict(state_dict)
        self._resumed = state_dict

    def _identity(self) -> dict[str, Any]:
        clips = self._clips.get("train")
        prints = "-".join(s.fingerprint for s in clips.shards) if clips else ""
        size = len(clips) if clips else 0
        return {"seed": self.seed, "weights": self.weights, "size": size, "fingerprint": prints}

    def train_dataloader(self) -> Loader:
        """Training batches from the cursor to the end of its epoch.

        Raises:
            ConfigError: There are fewer samples than a global batch holds, or the checkpoint is of other data.
        """
        clips = self._clips["train"]
        rank, world = self.rank_and_world()
        step = self.batch_size * world
        if len(clips) < step:
            raise ConfigError(
                f"{len(clips)} training samples, but a global batch takes {step}",
                where="data.init_args.batch_size",
                why=f"{world} rank(s) take {self.batch_size} each",
                fix="use more samples or smaller batches",
            )
        self._check_resumed()
        left_out = len(clips) % step
        rank_zero_info(f"{len(clips)} training samples: {len(clips) // step} batches an epoch, {left_out} left out")

        def requests() -> Iterable[Request]:
            cursor = settled(self.cursor, len(clips), step)
            return train_requests(self._order(clips, cursor["epoch"]), cursor, self.batch_size, rank, world)

        return self.loader(clips, requests, len(clips) // step, self.seed)

    def _order(self, clips: Clips, epoch: int) -> np.ndarray:
        if not self.weights:
            return permutation(self.seed, epoch, len(clips))
        groups: dict[str, list[int]] = {task: [] for task in self.weights}
        for number, (*_, task) in enumerate(clips.samples):
            groups[task].append(number)
        return mixture(self.seed, epoch, list(groups.values()), list(self.weights.values()))

    def _check_resumed(self) -> None:
        for name, now in self._identity().items():
            if self._resumed is not None and self._resumed[name] != now:
                raise ConfigError(
                    f"the checkpoint's training data has {name} {self._resumed[name]}, this run's has {now}",
                    where="data.init_args",
                    why="going on in the middle of another order would repeat and leave out samples",
                    fix="resume with the same data and seed, or start anew from the weights (init_from)",
                )

    def val_dataloader(self) -> Loader | list[Any]:
        """Validation batches; an empty list when there is no validation data."""
        return self._eval_loader("val") if "val" in self._clips else []

    def test_dataloader(self) -> Loader:
        """Test batches."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> Loader:
        """Prediction batches."""
        return self._eval_loader("predict")

    def _eval_loader(self, split: Split) -> Loader:
        clips = self._clips[split]
        requests = eval_requests(len(clips), self.eval_batch_size, *self.rank_and_world())
        return self.loader(clips, lambda: requests, len(requests), self.seed)

"""`VideoDataModule`: batches of conversations from shards, for training, validation, test and prediction."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from bernini.decoding import Limits
from bernini.errors import ConfigError
from bernini.planner.vision import VisionConfig
from datamodules.bad_samples import WatchBadSamples
from datamodules.buckets import Bounds
from datamodules.loading import Clips, Loader
from datamodules.mixing import Mix, SourceConfig
from datamodules.order import Mixed, Request, Shuffled, eval_requests
from datamodules.packed_order import PackConfig, Packed
from datamodules.resuming import OrderedDataModule
from datamodules.storage import StorageConfig

Split = Literal["train", "val", "test", "predict"]
Folders = str | list[str] | dict[str, SourceConfig] | None


class VideoDataModule(OrderedDataModule):
    """Batches of conversations from folders of shards that ``bernini prepare`` wrote.

    The order of training samples depends on the seed, the epoch and the data alone: not on ranks and workers. A resumed
    run goes on with the batch after the last optimizer step of its checkpoint. Raw clips are decoded in the workers;
    posteriors and text features are passed on.

    Args:
        train: Folder, or folders, with training shards; or sources by name, which are mixed by their weights, each
            gone through again and again.
        val: Folders with validation shards.
        test: Folders with test shards.
        predict: Folders with samples to predict; they need no targets.
        batch_size: Training samples per rank and batch.
        pack: Train on packs in place of batches: as many samples as fill a budget of tokens, at like cost on every
            rank. Null for `batch_size` samples each.
        eval_batch_size: Samples per rank and step everywhere else.
        workers: Worker processes per rank; 0 reads in the main process.
        start_method: How workers are started; null takes Python's default.
        seed: Seed of the order.
        tasks: Tasks to keep; null keeps all.
        shuffle_shards: Shards of a source whose samples are shuffled together. More of them mix better and read from
            more places at a time; a data set with fewer shards is shuffled as a whole.
        max_samples: Most validation, test and prediction samples; the first ones are kept.
        max_frames: Most frames of a raw clip; a longer one loses its end.
        max_edge: Longest edge of raw frames in pixels; larger ones are resized to multiples of 16.
        max_area: Most pixels of a raw frame, as 399360 for 480p; larger ones are resized, too.
        limits: What a raw file may cost before it is resized; null takes the defaults.
        max_bad_share: Largest share of training samples that may be bad, and replaced by others of their task, before
            the run stops; ten are always borne.
        vision: Have the workers make of raw clips what the vision tower of a planner takes. `bernini fit` gives the
            planner's own; null leaves that to the training process.
        storage: How folders behind URLs are reached, and kept on this machine.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self,
        train: str | list[str] | dict[str, SourceConfig] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        batch_size: int = 1,
        pack: PackConfig | None = None,
        eval_batch_size: int = 1,
        workers: int = 0,
        start_method: Literal["fork", "spawn", "forkserver"] | None = None,
        seed: int = 0,
        tasks: list[str] | None = None,
        shuffle_shards: int = 16,
        max_samples: int | None = None,
        max_frames: int | None = None,
        max_edge: int | None = None,
        max_area: int | None = None,
        limits: Limits | None = None,
        max_bad_share: float = 0.001,
        vision: VisionConfig | None = None,
        storage: StorageConfig | None = None,
    ) -> None:
        super().__init__(workers, start_method)
        if min(batch_size, eval_batch_size, shuffle_shards) < 1 or workers < 0 or seed < 0:
            raise ConfigError(
                "batch sizes and shuffle_shards are 1 or more, workers and seed 0 or more", where="data.init_args"
            )
        if pack and batch_size != 1:
            raise ConfigError(
                f"batch_size is {batch_size}", where="data.init_args.batch_size", why="`pack` fills batches by tokens",
                fix="leave one of them out",
            )  # fmt: skip
        self.folders: dict[Split, Folders] = {"train": train, "val": val, "test": test, "predict": predict}
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.tasks, self.max_samples, self.shuffle_shards = tasks, max_samples, shuffle_shards
        self.bounds, self.vision = Bounds(max_frames, max_edge, max_area, limits or Limits()), vision
        self.mix = Mix({name: source.weight for name, source in _by_name(train).items()})
        self.storage, self.max_bad_share, self.pack = storage, max_bad_share, pack
        if pack:
            self.cursor |= {"pack": 0, "packs": 0}
        self._clips: dict[Split, Clips] = {}
        self._packed: Packed | None = None

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
        self._clips[split] = Clips(
            _by_name(folders),
            self.tasks,
            limit=None if split == "train" else self.max_samples,
            targets=split != "predict",
            bounds=self.bounds,
            vision=self.vision,
            storage=self.storage,
            seed=self.seed if split == "train" else None,
        )

    def identity(self) -> dict[str, Any]:
        """Seed, hash of the training samples, hash of how they are mixed and shuffled, and what packs depend on."""
        return {
            **super().identity(),
            "seed": self.seed,
            "fingerprint": _hash([span.fingerprint for span in self._clips["train"].spans]),
            "mix": _hash([self.mix.table, self.shuffle_shards]),
            "packing": self._packed and self._packed.identity,
        }

    def train_dataloader(self) -> Loader:
        """Training batches from the cursor to the end of its epoch.

        Raises:
            ConfigError: There are fewer samples than a global batch holds, or the checkpoint is of other data.
        """
        clips = self._clips["train"]
        orders = [
            Shuffled(span.shards, self.shuffle_shards, self.seed, (int(span.fingerprint, 16), number), span.first)
            for number, span in enumerate(clips.spans)
        ]
        order = Mixed(self.mix, orders)
        if self.pack is None:
            return self.train_loader(clips, order, len(clips), self.batch_size, self.seed)
        return self._packed_loader(clips, order, self.pack)

    def _packed_loader(self, clips: Clips, order: Mixed, pack: PackConfig) -> Loader:
        tokens = clips.count_tokens()
        means = [tokens[span.first : span.first + sum(span.shards)].mean() for span in clips.spans]
        mean = float(np.dot(self.mix.table[0][1], means))
        rank, self.batch = self.rank_and_world()
        packs = self.batch * self.accumulated()
        self._packed = packed = Packed(order, len(clips), tokens, mean, pack, packs, self.seed)
        self.check_resumed()
        length = packed.steps * self.accumulated()
        rank_zero_info(
            f"{len(clips)} training samples of {mean:.0f} tokens: about {length} packs an epoch on each rank"
        )

        def requests() -> Iterator[Request]:
            return packed.requests(self.cursor, length, rank, self.batch)

        return self.loader(clips, requests, length, self.seed)

    def measures(self) -> dict[str, float]:
        """Of the last packs how full and how even they were; of each of several sources its share and epochs so far."""
        measures = self._packed.measures(self.cursor) if self._packed else {}
        if len(self.mix.names) == 1:
            return measures
        clips = self._clips["train"]
        number = self.cursor["epoch"] * len(clips) + self.cursor["sample"]
        counts, asked = self.mix.counts(number), self.mix.asked(number)
        for name, span, count, share in zip(self.mix.names, clips.spans, counts, asked, strict=True):
            measures[f"data/share/{name}"] = count / number
            measures[f"data/asked/{name}"] = share / number
            measures[f"data/epoch/{name}"] = count / sum(span.shards)
        return measures

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


def _by_name(folders: Folders) -> Mapping[str, SourceConfig]:
    return folders if isinstance(folders, dict) else {"all": SourceConfig(folders or [])}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]

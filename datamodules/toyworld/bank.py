"""ToyBankDataModule: toy samples drawn and encoded once, then trained from the device's memory."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bernini.bank import Bank, Rows
from bernini.conversation import Batch, Conversation
from bernini.errors import ConfigError
from bernini.renderer.bank import Stack, load_stacks, save_stacks
from bernini.renderer.packing import pad_context
from bernini.tasks import get_task
from bernini.text.encoder import TextEncoder
from bernini.text.prompt import renderer_text
from bernini.vae.codec import LatentCodec, to_unit
from bernini.vae.whole import encode, for_whole_clips
from datamodules.loading import ErrorsAsValues, Loader
from datamodules.order import Request, eval_requests, permutation
from datamodules.resuming import OrderedDataModule, Requests
from datamodules.toyworld.data import Batches, ToyWorld

AT_ONCE = 256  # samples that are drawn and encoded together
STEP = 64  # of the size of an encoded batch
Kind = tuple[str, tuple[int, ...]]
"""Task and frames of the sources: what samples of one stack have in common."""


class Encoder:
    """Turns drawn samples into stacks.

    Args:
        vae: Folder of the VAE.
        text: Folder with ``text_encoder/`` and ``tokenizer/``.
        rows: Context rows of a sample.
        device: Where it runs and where the stacks lie.
    """

    def __init__(self, vae: str, text: str, rows: int, device: torch.device) -> None:
        self.codec = LatentCodec.from_pretrained(vae).to(device)
        for_whole_clips(self.codec.vae)
        self.text = TextEncoder.from_pretrained(text).to(device)
        self.rows, self.device = rows, device

    def stacks(self, batches: Iterable[Batch]) -> list[Stack]:
        """Encode samples; those of one kind come together, in order, and kinds in the order of `Kind`."""
        waiting: dict[Kind, list[Conversation]] = defaultdict(list)
        encoded: dict[Kind, list[Stack]] = defaultdict(list)
        for sample in (sample for batch in batches for sample in batch.samples):
            kind = kind_of(sample)
            waiting[kind].append(sample)
            if len(waiting[kind]) == AT_ONCE:
                encoded[kind].append(self._stack(waiting.pop(kind)))
        for kind, samples in waiting.items():
            encoded[kind].append(self._stack(samples))
        return [_joined(parts) for _, parts in sorted(encoded.items(), key=lambda item: item[0])]

    def _stack(self, samples: Sequence[Conversation]) -> Stack:
        """Samples of one kind as a stack."""
        columns = zip(*map(_pixels, samples), strict=True)
        *sources, target = (self._posterior(torch.stack(column)) for column in columns)
        task = samples[0].task
        texts = self._features([renderer_text(task, sample.prompt) for sample in samples])
        return Stack(task, tuple(sources), target, texts, dropped=self._features([renderer_text(task, "")])[0])

    @torch.no_grad()
    def _posterior(self, pixels: Tensor) -> Tensor:
        """Posteriors of clips of one size, in batches of few sizes: convolutions are planned for each size anew."""
        missing = -len(pixels) % STEP
        padded = torch.cat([pixels, pixels[:1].expand(missing, *pixels.shape[1:])])
        made = encode(self.codec.vae, to_unit(padded.to(self.device))).parameters[: len(pixels)]
        return made.half().contiguous()  # random numbers are drawn in memory's order, and a file keeps none but this

    def _features(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([pad_context(features.float(), self.rows) for features in self.text.encode(texts)])


def kind_of(sample: Conversation) -> Kind:
    """What kind a sample is of."""
    return sample.task, tuple(pixels.shape[1] for pixels in _pixels(sample)[:-1])


def _pixels(sample: Conversation) -> list[Tensor]:
    """``[3, T, H, W]`` uint8 of each source, then of the target."""
    return [m.media.pixels for m in [*sample.sources, *sample.targets]]  # type: ignore[misc, union-attr]


def _joined(parts: Sequence[Stack]) -> Stack:
    """Stacks of one kind as one."""
    sources = zip(*(part.sources for part in parts), strict=True)
    return Stack(
        task=parts[0].task,
        sources=tuple(torch.cat(column) for column in sources),
        target=torch.cat([part.target for part in parts]),
        text=torch.cat([part.text for part in parts]),
        dropped=parts[0].dropped,
    )


def shares(numbers: Sequence[int], whole: int) -> list[int]:
    """Whole numbers, 1 or more, about in proportion to ``numbers``, that add up to ``whole`` (largest remainder)."""
    exact = [max(1.0, whole * number / sum(numbers)) for number in numbers]
    exact = [1 + (x - 1) * (whole - len(exact)) / max(sum(exact) - len(exact), 1e-9) for x in exact]
    parts = [int(x) for x in exact]
    for place in sorted(range(len(exact)), key=lambda n: parts[n] - exact[n])[: whole - sum(parts)]:
        parts[place] += 1
    return parts


class RowsOfBank(Dataset[Rows]):
    """Batch number n of a bank: every stack is gone through in an order of its own, shuffled anew after each pass.

    Args:
        bank: The bank.
        seed: Seed of the orders.
    """

    def __init__(self, bank: Bank[Any], seed: int) -> None:
        self.bank = bank
        sizes = [len(stack) for stack in bank.stacks]
        self._order = lru_cache(2 * len(sizes))(lambda stack, epoch: permutation(seed, epoch, sizes[stack], stack))

    def __getitem__(self, number: int) -> Rows:
        rows = [self._rows(stack, number * count, count) for stack, count in enumerate(self.bank.counts)]
        return Rows(torch.from_numpy(np.concatenate(rows)), {"epoch": 0, "sample": number + 1})

    def _rows(self, stack: int, first: int, count: int) -> np.ndarray:
        """Rows at the positions from ``first`` on in a stack's endless order."""
        epoch, place = divmod(first, len(self.bank.stacks[stack]))
        rows = self._order(stack, epoch)[place : place + count]
        missing = count - len(rows)
        return np.concatenate([rows, self._rows(stack, first + len(rows), missing)]) if missing else rows


def weights_of(vae: str, text: str) -> str:
    """Hashes of the files that encode clips and texts."""
    folders = Path(vae), Path(text) / "text_encoder", Path(text) / "tokenizer"
    files = [file for folder in folders for file in sorted(folder.glob("*.*"))]
    return " ".join(hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files)


def in_parts(length: int) -> list[Request]:
    """Requests for the samples below ``length``, `AT_ONCE` in each."""
    starts = range(0, length, AT_ONCE)
    return [Request(list(range(start, min(start + AT_ONCE, length))), 0, {}) for start in starts]


def check_alone(data: OrderedDataModule) -> None:
    """Refuse several ranks.

    Raises:
        ConfigError: There are some.
    """
    if data.rank_and_world()[1] > 1:
        raise ConfigError("a bank serves one device", where="trainer.devices", fix="trainer.devices: 1")


def rows_loader(data: OrderedDataModule, bank: Bank[Any], length: int, seed: int) -> Loader:
    """Rows of a bank, from a data module's cursor on; an epoch is one pass over as many samples as were drawn."""
    steps = max(1, length // bank.batch_size)

    def numbers() -> Iterable[int]:
        first = data.cursor["sample"]
        return range(first, (first // steps + 1) * steps)

    # Without workers: the bank is in this process.
    return Loader(ErrorsAsValues(RowsOfBank(bank, seed)), sampler=Requests(numbers, steps), batch_size=None)


class ToyBankDataModule(OrderedDataModule):
    """Draws toy samples once, encodes them on the trainer's device and keeps them there, for `BankedRendererModule`.

    Every batch holds the same number of samples of each kind (task and number of sources). Which ones is a function of
    the seed and the batch's number alone. Validation batches are held-out samples as `ToyWorldDataModule` draws them.

    Args:
        vae: Folder of the VAE.
        text: Folder with ``text_encoder/`` and ``tokenizer/``.
        tasks: Samples of each task in a batch.
        rows: Context rows of a sample, as the module's ``text.rows``.
        frames: Frames of a clip, 4k + 1 for the Wan VAE.
        height: In pixels.
        width: In pixels.
        length: Samples of all tasks that are drawn, in the proportions of a batch.
        val_length: Validation samples.
        val_batch_size: Samples of a validation batch.
        workers: Processes that draw; 0 draws in the training process.
        seed: Seed of the world and of the order.
        file: Where the encoded samples are kept for further runs of the same settings; null keeps them in memory alone.
    """

    def __init__(
        self,
        vae: str,
        text: str,
        tasks: dict[str, int],
        rows: int = 48,
        frames: int = 9,
        height: int = 64,
        width: int = 64,
        length: int = 48000,
        val_length: int = 96,
        val_batch_size: int = 48,
        workers: int = 0,
        seed: int = 0,
        file: str | None = None,
    ) -> None:
        super().__init__(workers)
        if not tasks or min(tasks.values()) < 1 or min(length, val_length, val_batch_size) < 1 or workers < 0:
            raise ConfigError("lengths and samples of a task are 1 or more, workers 0 or more", where="data.init_args")
        self.vae, self.text, self.rows, self.seed = vae, text, rows, seed
        self.tasks = {get_task(task).name: count for task, count in tasks.items()}
        self.length, self.val_length, self.val_batch_size = length, val_length, val_batch_size
        self._train = ToyWorld(self.tasks, frames, height, width, seed, "train")
        self._held_out = ToyWorld(self.tasks, frames, height, width, seed, "held_out")
        self.file = Path(file) if file else None
        self.bank: Bank[Stack] | None = None

    def setup(self, stage: str) -> None:
        """Draw and encode the training samples.

        Raises:
            ConfigError: There are several ranks, or too few samples to have all kinds of a task.
        """
        super().setup(stage)
        check_alone(self)
        if stage != "fit" or self.bank:
            return
        device = self.trainer.strategy.root_device  # type: ignore[union-attr]
        if self.file and self.file.is_file():
            stacks = load_stacks(self.file, device, self._made_from())
        else:
            stacks = Encoder(self.vae, self.text, self.rows, device).stacks(self._drawn())
            if self.file:
                save_stacks(self.file, stacks, self._made_from())
        counts: list[int] = []
        for task, whole in sorted(self.tasks.items()):
            sizes = [len(stack) for stack in stacks if stack.task == task]
            if len(sizes) > whole:
                raise ConfigError(
                    f"{whole} samples of {task} in a batch, but they come in {len(sizes)} kinds",
                    where=f"data.init_args.tasks.{task}",
                    why="each number of sources is a kind of its own",
                    fix=f"{len(sizes)} or more",
                )
            counts += shares(sizes, whole)
        self.bank = Bank(tuple(stacks), tuple(counts))

    def _made_from(self) -> str:
        """The world, how many samples of it, and what encodes them."""
        return f"{self._train}, {self.length} samples, {self.rows} rows, {weights_of(self.vae, self.text)}"

    def _drawn(self) -> Loader:
        requests = in_parts(self.length)
        return self.loader(Batches(self._train), lambda: requests, len(requests), self.seed)

    def train_dataloader(self) -> Loader:
        """Rows of the bank, from the cursor on; an epoch is one pass over as many samples as were drawn."""
        assert self.bank is not None
        return rows_loader(self, self.bank, self.length, self.seed)

    def val_dataloader(self) -> Loader:
        """Batches of held-out samples."""
        requests = eval_requests(self.val_length, self.val_batch_size, *self.rank_and_world())
        return self.loader(Batches(self._held_out), lambda: requests, len(requests), self.seed)

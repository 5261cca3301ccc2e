"""Samples of five tasks and many sizes, in packs and in padded batches of the same budget of tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from bernini.errors import ConfigError
from bernini.renderer.packing import PackedSample, Segment
from datamodules.buckets import Bounds, Size, tokens
from datamodules.order import Shuffled
from datamodules.packed_order import PackConfig, Packed

TASKS = ("t2i", "i2i", "t2v", "v2v", "r2v")
FRAMES = (17, 33, 49, 65, 81)
SHAPES = ((720, 1280), (1280, 720), (1024, 1024))  # height and width of raw frames


@dataclass(frozen=True)
class Sizes:
    """One sample, as sizes in pixels.

    Attributes:
        task: Its task.
        target: Frames, height and width of what it makes.
        sources: The same of what it is given.
    """

    task: str
    target: Size
    sources: tuple[Size, ...]

    @property
    def tokens(self) -> int:
        """Tokens of target and sources."""
        return sum(tokens(*size) for size in (self.target, *self.sources))


def draw_mix(count: int, bounds: Bounds, seed: int) -> list[Sizes]:
    """Samples of the five tasks, equally many of each: clips of 17 to 81 frames, one to three references."""
    generator = np.random.default_rng(seed)
    drawn = []
    for number in range(count):
        task, shape = TASKS[number % len(TASKS)], SHAPES[generator.integers(len(SHAPES))]
        image, clip = bounds.bucket(1, *shape), bounds.bucket(int(generator.choice(FRAMES)), *shape)
        target = image if task.endswith("i") else clip
        references = (image,) * int(generator.integers(1, 4))
        drawn.append(Sizes(task, target, {"i2i": (image,), "v2v": (clip,), "r2v": references}.get(task, ())))
    return drawn


@dataclass(frozen=True)
class Group:
    """Samples that a device is given at once.

    Attributes:
        samples: The samples.
        length: Tokens to which each is padded; 0 for none.
        step: Optimizer step that it belongs to.
    """

    samples: list[Sizes]
    length: int
    step: int

    @property
    def real(self) -> int:
        """Tokens of the samples."""
        return sum(sample.tokens for sample in self.samples)


def packs(mix: Sequence[Sizes], config: PackConfig, ranks: int, seed: int) -> Iterator[Group]:
    """The packs of a run on so many ranks, one rank after the other, as training has them."""
    sizes = np.asarray([sample.tokens for sample in mix])
    order = Shuffled([len(mix)], 1, seed)
    packed = Packed(order, len(mix), sizes, float(sizes.mean()), config, ranks, seed)
    cursor = {"epoch": 0, "sample": 0, "pack": 0, "packs": 0}
    each = [packed.requests(cursor, packed.steps, rank, ranks) for rank in range(ranks)]
    for step, requests in enumerate(zip(*each, strict=True)):
        yield from (Group([mix[number] for number in request.samples], 0, step) for request in requests)


def padded(mix: Sequence[Sizes], budget: int, seed: int) -> Iterator[Group]:
    """Batches of samples that follow each other, as many as fit the budget when all are as long as the longest."""
    order = Shuffled([len(mix)], 1, seed)
    batch: list[Sizes] = []
    step = 0
    for position in range(len(mix)):
        sample = mix[order[position]]
        longest = max(one.tokens for one in (*batch, sample))
        if batch and longest * (len(batch) + 1) > budget:
            yield Group(batch, max(one.tokens for one in batch), step)
            batch, step = [], step + 1
        batch.append(sample)


def take(groups: Iterator[Group], count: int) -> list[Group]:
    """The first so many.

    Raises:
        ConfigError: There are fewer.
    """
    found = list(islice(groups, count))
    if len(found) < count:
        raise ConfigError(f"the mix is enough for {len(found)} of {count} groups", fix="give more --samples")
    return found


class Maker:
    """Makes random latents and texts of samples, as a renderer reads them.

    Args:
        channels: Channels of a latent.
        text: Random text features ``[rows, text_dim]``, which all samples share.
        seed: Seed of latents.
    """

    def __init__(self, channels: int, text: Tensor, seed: int) -> None:
        self.channels, self.text = channels, text
        self.generator = torch.Generator(text.device).manual_seed(seed)

    def latent(self, size: Size) -> Tensor:
        """``[C, T, H, W]`` of a visual of that size in pixels."""
        frames, height, width = size
        shape = (self.channels, 1 + (frames - 1) // 4, 2 * -(-height // 16), 2 * -(-width // 16))
        return torch.randn(shape, generator=self.generator, device=self.text.device)

    def samples(self, group: Group) -> list[PackedSample]:
        """Samples as `pack` takes them, those of equal lengths side by side; padding is a source of zeros."""
        made = []
        for sizes in sorted(group.samples, key=lambda sample: sample.tokens):
            segments = [Segment(self.latent(size), number + 1.0) for number, size in enumerate(sizes.sources)]
            segments.append(Segment(self.latent(sizes.target), 0))
            if missing := max(0, group.length - sizes.tokens):
                segments.append(Segment(self.text.new_zeros(self.channels, missing, 2, 2, dtype=torch.float32), 1))
            made.append(PackedSample(segments, self.text, 500.0))
        return made

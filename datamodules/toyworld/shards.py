"""Shards of the toy world."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch

from bernini.conversation import Conversation
from datamodules.prepare import TEXT_FEATURES, Featurizer
from datamodules.shards import Shards, write_shards
from datamodules.toyworld.items import Split, items

_AT_ONCE = 8  # samples that features are made of together


def write_toy_shards(
    folder: str | Path,
    tasks: Sequence[str] | Mapping[str, float],
    count: int,
    *,
    seed: int = 0,
    frames: int = 17,
    height: int = 64,
    width: int = 64,
    split: Split = "train",
    edits: Sequence[str] | None = None,
    vae: str | None = None,
    text: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Shards:
    """Write samples of the toy world as shards: raw ones that keep every pixel, or prepared ones.

    Args:
        folder: Folder for the shards.
        tasks: See `datamodules.toyworld.items`, as for the arguments down to ``edits``.
        count: See there.
        seed: See there.
        frames: See there.
        height: See there.
        width: See there.
        split: See there.
        edits: See there.
        vae: Folder of a Wan VAE: store its latents in place of pixels.
        text: Folder with a text encoder: store text features too.
        progress: Called with the number of samples made.
    """
    features = Featurizer(vae, text, torch.float32, torch.device("cpu"))
    made = items(tasks, count, seed=seed, frames=frames, height=height, width=width, split=split, edits=edits)

    def finished() -> Iterator[Conversation]:
        done = 0
        while samples := list(islice(made, _AT_ONCE)):
            yield from features(samples)
            done += len(samples)
            progress(done)

    shards = write_shards(finished(), folder, lossless=True)
    features.write_table(Path(folder) / TEXT_FEATURES, {entry.task for entry in shards.entries}, "")
    return shards

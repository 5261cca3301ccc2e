"""Samples of the study: subject-to-video items of the toy world, encoded once, grouped by their number of sources."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from bernini.conversation import Conversation, Message
from bernini.errors import DataError
from bernini.files import replacing
from bernini.renderer.packing import pad_context
from bernini.text.encoder import TextEncoder
from bernini.text.prompt import renderer_text
from bernini.vae.codec import LatentCodec
from datamodules.toyworld import make_item
from datamodules.toyworld.items import Split

TASK = "r2v"
TRAINED = (1, 2, 3, 4, 5)
COMPARED, BEYOND = (1, 2, 4), (6, 8, 10)
CONTEXT_ROWS = 64
ENCODED_AT_ONCE = 128
Map = Callable[..., Iterator[Any]]

In = TypeVar("In")
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Clips:
    """Size of the study's clips.

    Attributes:
        frames: Frames of a target, 4k + 1.
        size: Height and width in pixels.
    """

    frames: int = 9
    size: int = 64

    def item(self, split: Split, references: int, index: int) -> Conversation:
        """Sample ``index`` among those with so many reference images; those of the train split share no scenes."""
        seed = references if split == "train" else 0
        frames, size = self.frames, self.size
        return make_item(
            TASK, index, seed=seed, frames=frames, height=size, width=size, split=split, references=references
        )


@dataclass(frozen=True)
class Batch:
    """Samples of equal shapes.

    Attributes:
        sources: ``[B, k, C, 1, h, w]`` normalised latents.
        targets: ``[B, C, t, h, w]`` normalised latents.
        contexts: ``[B, rows, text_dim]``.
    """

    sources: Tensor
    targets: Tensor
    contexts: Tensor


@dataclass(frozen=True)
class Examples:
    """All samples with one number of sources.

    Attributes:
        pictures: ``[P, C, 1, h, w]`` latents of all different pictures.
        sources: ``[N, k]`` rows of ``pictures``.
        targets: ``[N, C, t, h, w]`` latents.
        contexts: ``[N, rows, text_dim]``.
    """

    pictures: Tensor
    sources: Tensor
    targets: Tensor
    contexts: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, rows: Tensor) -> Batch:
        """The samples with these numbers, ``[B]``, in fp32."""
        sources = self.pictures[self.sources[rows]].float()
        return Batch(sources, self.targets[rows].float(), self.contexts[rows].float())


@contextmanager
def workers(count: int) -> Iterator[Map]:
    """A ``map`` over ``count`` processes of one thread each; 0 maps in this process."""
    if not count:
        yield map
        return
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(count, context, torch.set_num_threads, (1,)) as executor:
        yield partial(executor.map, chunksize=16)


def _pixels(message: Message) -> Pixels:
    assert message.media is not None and message.media.pixels is not None
    return message.media.pixels.numpy()


def _draw(clips: Clips, split: Split, references: int, index: int) -> tuple[str, list[Pixels], Pixels]:
    """Text, pictures ``[3, 1, H, W]`` and target ``[3, T, H, W]`` of a sample."""
    item = clips.item(split, references, index)
    return renderer_text(TASK, item.prompt), [_pixels(m) for m in item.sources], _pixels(item.targets[0])


class Encoder:
    """Turns samples into tensors that a model is trained on.

    Args:
        assets: Folder with ``vae/``, ``text_encoder/`` and ``tokenizer/``.
        device: Where it runs.
    """

    def __init__(self, assets: Path, device: torch.device) -> None:
        self.device = device
        self.codec = LatentCodec.from_pretrained(assets / "vae").to(device)
        self.text = TextEncoder.from_pretrained(assets).to(device)

    def latents(self, clips: Sequence[Pixels]) -> Tensor:
        """Modes of the posteriors, normalised, ``[N, C, t, h, w]`` fp16 on the CPU; clips are of one shape."""
        parts = [torch.from_numpy(np.stack(part)).to(self.device) for part in _chunks(clips, ENCODED_AT_ONCE)]
        return torch.cat([self.codec.normalize(self.codec.posterior(x)).half().cpu() for x in parts])

    def contexts(self, texts: Sequence[str]) -> Tensor:
        """Text features with zero rows, ``[N, rows, text_dim]`` fp16 on the CPU."""
        return torch.stack([pad_context(rows, CONTEXT_ROWS) for rows in self.text.encode(texts)]).half().cpu()

    def write(self, path: Path, clips: Clips, split: Split, counts: Sequence[int], samples: int, mapped: Map) -> None:
        """Draw, encode and save samples.

        Args:
            path: File to write.
            clips: Their size.
            split: Split of the toy world.
            counts: Numbers of references.
            samples: Samples of each.
            mapped: Maps over samples to be drawn, see `workers`.
        """
        tensors: dict[str, Tensor] = {}
        pictures: dict[bytes, tuple[int, Pixels]] = {}  # portraits are few: each is kept and encoded once
        for count in counts:
            sources, targets, contexts = [], [], []
            for part in _chunks(mapped(partial(_draw, clips, split, count), range(samples)), ENCODED_AT_ONCE):
                for _, shown, _ in part:
                    found = [pictures.setdefault(p.tobytes(), (len(pictures), p)) for p in shown]
                    sources.append([number for number, _ in found])
                targets.append(self.latents([target for _, _, target in part]))
                contexts.append(self.contexts([text for text, _, _ in part]))
            tensors[f"{count}.sources"] = torch.tensor(sources)
            tensors[f"{count}.targets"], tensors[f"{count}.contexts"] = torch.cat(targets), torch.cat(contexts)
        tensors["pictures"] = self.latents([p for _, p in pictures.values()])
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"frames": str(clips.frames), "size": str(clips.size)})


def load(path: Path, device: torch.device) -> dict[int, Examples]:
    """Read samples onto a device.

    Returns:
        Examples by their number of references.

    Raises:
        DataError: The file is not there.
    """
    if not path.is_file():
        fix = "run `python -m benchmarks.quality.rope_study data`"
        raise DataError("the study has no samples yet", where=str(path), fix=fix)
    tensors = load_file(path, device=str(device))
    counts = sorted({int(name.partition(".")[0]) for name in tensors if name != "pictures"})
    parts: Any = ("sources", "targets", "contexts")
    return {k: Examples(tensors["pictures"], *(tensors[f"{k}.{part}"] for part in parts)) for k in counts}


def _chunks(values: Iterable[In], size: int) -> Iterator[list[In]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, size)):
        yield chunk

"""Models that measure: CLIP, DINO and DINOv2 of transformers, and linear heads that rate CLIP's features.

Weights come from folders as they are published; nothing is fetched. All compute in float32, where some official
scripts take CLIP in float16.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, normalize
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Model,
    ViTModel,
)

from benchmarks.quality.metrics.preparing import pictures
from bernini.checkpoints.parts import read_json
from bernini.errors import CheckpointError

BATCH = 32  # frames that a model is shown together, as in VBench
Loaded = TypeVar("Loaded")


class Encoder:
    """A model whose frames and features come in batches.

    Args:
        folder: Its files as they are published, with ``config.json``.
        device: Where it computes.
        kind: Its class in transformers.

    Raises:
        CheckpointError: The folder does not hold such a model, whole.
    """

    def __init__(self, folder: Path, device: torch.device, kind: Any) -> None:
        self.device, wanted = device, kind.config_class.model_type
        found = read_json(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
        if found != wanted:
            raise CheckpointError(
                f"there is no {kind.__name__} here",
                where=str(folder),
                why=f"config.json is of {found!r}, not {wanted!r}" if found else "there is no config.json",
                fix="give the folder of the weights as they are published",
            )
        self.model: Any = read(folder, lambda: _whole(kind, folder)).to(device).eval()

    def batched(self, encode: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
        """Features ``[T, ...]`` of prepared frames ``[T, 3, h, w]``, on the CPU."""
        with torch.no_grad():
            return torch.cat([encode(part.to(self.device)).float().cpu() for part in frames.split(BATCH)])


class Clip(Encoder):
    """A CLIP of transformers.

    Args:
        folder: Its files.
        device: Where it computes.
        shown: Folder with the processor and the tokenizer, if they are another's.
    """

    def __init__(self, folder: Path, device: torch.device, shown: Path | None = None) -> None:
        super().__init__(folder, device, CLIPModel)
        at = shown or folder
        self.processor = read(at, lambda: CLIPImageProcessorPil.from_pretrained(at, local_files_only=True))
        self.tokenizer = read(at, lambda: CLIPTokenizer.from_pretrained(at, local_files_only=True))
        if len(self.tokenizer) != (tokens := self.model.config.text_config.vocab_size):
            raise CheckpointError(  # without its files transformers makes a tokenizer that knows no word
                f"the tokenizer has {len(self.tokenizer)} tokens, the model {tokens}",
                where=str(at),
                why="tokenizer.json, or vocab.json and merges.txt, are missing or another model's",
                fix="download them, too",
            )

    @property
    def scale(self) -> float:
        """What a cosine is multiplied with to make a logit, about 100."""
        return float(self.model.logit_scale.exp().item())

    def shown(self, images: Any) -> Tensor:
        """Pillow's images as the folder's own processor prepares them, ``[T, 3, h, w]``."""
        return torch.cat([self.processor(images=[image], return_tensors="pt").pixel_values for image in images])

    def pooled(self, frames: Tensor) -> Tensor:
        """Features of prepared frames before they are projected, ``[T, D]``."""
        return self.batched(lambda part: self.model.vision_model(pixel_values=part).pooler_output, frames)

    def images(self, frames: Tensor) -> Tensor:
        """Features of prepared frames ``[T, D]``."""
        return self.batched(self._projected, frames)

    @torch.no_grad()
    def text(self, text: str, *, ends: bool = True) -> Tensor:
        """Features of a text ``[1, D]``.

        Args:
            text: The text, of which as many tokens count as the model has places, 77.
            ends: Whether a text that is cut keeps the token that ends it; torchmetrics cuts it off, too.
        """
        places = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([text], truncation=ends, max_length=places, return_tensors="pt")
        cut = {name: rows[:, :places].to(self.device) for name, rows in tokens.items()}
        features: Tensor = self.model.text_projection(self.model.text_model(**cut).pooler_output)
        return features.float().cpu()

    def _projected(self, frames: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=frames).pooler_output)


class Rated(Clip):
    """A CLIP and a head that rates its features.

    Args:
        folder: CLIP's files.
        head: Weights of linear layers, one after the other, by a name that ends on ``weight`` or ``bias``.
        device: Where it computes.
    """

    def __init__(self, folder: Path, head: Path, device: torch.device) -> None:
        super().__init__(folder, device)
        self.layers = _layers(head, self.model.config.projection_dim)

    def ratings(self, frames: Tensor) -> Tensor:
        """A rating ``[T]`` of each prepared frame, about 1 to 10."""
        features = normalize(self.images(frames), dim=-1)
        for weight, bias in self.layers:
            features = linear(features, weight, bias)
        return features[:, 0]


class Dino(Encoder):
    """A DINO of transformers. It takes images of any size, as the authors' own code does."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(folder, device, ViTModel)
        embeddings = self.model.embeddings
        embeddings.interpolate_pos_encoding = lambda _, height, width: _positions(embeddings, height, width)

    def features(self, frames: Tensor) -> Tensor:
        """Features of prepared frames ``[T, D]``: the class token after the last norm."""
        return self.batched(lambda part: self._run(part).last_hidden_state[:, 0], frames)

    def keys(self, frames: Tensor) -> Tensor:
        """Keys of the last layer's attention ``[T, places, D]``, of which the first is the class token's."""
        layer = [part for name, part in self.model.named_modules() if name.endswith((".k_proj", ".key"))][-1]
        kept: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _, inputs, output: kept.append(output))
        try:
            return self.batched(lambda part: (self._run(part), kept.pop())[1], frames)
        finally:
            handle.remove()

    def _run(self, frames: Tensor) -> Any:
        return self.model(pixel_values=frames, interpolate_pos_encoding=True)


class Dinov2(Encoder):
    """A DINOv2 of transformers, with the folder's own processor."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(folder, device, Dinov2Model)
        self.processor = read(folder, lambda: BitImageProcessorPil.from_pretrained(folder, local_files_only=True))

    def features(self, clip: Tensor) -> Tensor:
        """Features of a clip ``[3, T, H, W]`` uint8, ``[T, D]``: the class token after the last norm."""
        images = pictures(clip)
        frames = torch.cat([self.processor(images=[image], return_tensors="pt").pixel_values for image in images])
        return self.batched(lambda part: self.model(pixel_values=part).pooler_output, frames)


def read(folder: Path, load: Callable[[], Loaded]) -> Loaded:
    """Load a part of a folder.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            "the weights cannot be read",
            where=str(folder),
            why=f"{type(error).__name__}: {error}".strip().splitlines()[0],
            fix="download them again, whole",
        ) from error


def _whole(kind: Any, folder: Path) -> nn.Module:
    """A model none of whose weights were missing.

    Raises:
        ValueError: Some were, or were of another size.
    """
    unused = {"add_pooling_layer": False} if kind is ViTModel else {}  # DINO has no such layer
    model, told = kind.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **unused
    )
    if absent := sorted(told["missing_keys"]):
        raise ValueError(f"{len(absent)} tensors are missing, such as {absent[0]}")
    return model


def _layers(path: Path, width: int) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of linear layers, of which the first takes ``width`` features, and the last gives one.

    Raises:
        CheckpointError: The file holds no such layers.
    """
    stored = stored_tensors(path)
    names = [name.removesuffix("weight") for name in stored if name.endswith("weight")]
    pairs = [(stored[f"{name}weight"].float(), stored[f"{name}bias"].float()) for name in names]
    shapes = [tuple(weight.shape) for weight, _ in pairs]
    widths = [width, *(len(bias) for _, bias in pairs)]
    if widths[-1] != 1 or shapes != [(after, before) for before, after in pairwise(widths)]:
        why = f"its layers are {', '.join(map(str, shapes)) or 'none'}"
        fix = "give the head's file as it is published"
        raise CheckpointError(
            f"the head does not make one rating of {width} features", where=str(path), why=why, fix=fix
        )
    return pairs


def stored_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a file that `torch.save` wrote; no code in it is run.

    Raises:
        CheckpointError: It is no such file.
    """
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        return {name: value for name, value in stored.items() if isinstance(value, Tensor)}
    except Exception as error:  # torch has many for one damaged file
        raise CheckpointError(
            "the weights cannot be read",
            where=str(file),
            why=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="download them again, whole",
        ) from error


def _positions(embeddings: Any, height: int, width: int) -> Tensor:
    """DINO's embeddings of places for an image of another size.

    The authors' code widens the grid by a tenth of a place before it takes the scale, so that places lie elsewhere than
    transformers has them. Source: facebookresearch/dino, `interpolate_pos_encoding` in `vision_transformer.py`.
    """
    stored: Tensor = embeddings.position_embeddings
    rows, columns = height // embeddings.patch_size, width // embeddings.patch_size
    edge = math.isqrt(stored.shape[1] - 1)
    if rows * columns == edge**2 and height == width:
        return stored
    grid = stored[:, 1:].reshape(1, edge, edge, -1).permute(0, 3, 1, 2)
    scale = ((rows + 0.1) / edge, (columns + 0.1) / edge)
    places = interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat((stored[:, :1], places.flatten(2).transpose(1, 2)), 1)

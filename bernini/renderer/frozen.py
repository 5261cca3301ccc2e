"""The frozen VAE and text encoder of a module that trains or samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bernini.conversation import Conversation
from bernini.text.encoder import MAX_TOKENS, TextFeatures
from bernini.text.prompt import renderer_text
from bernini.vae.codec import LatentCodec


@dataclass
class TextConfig:
    """Where text features come from.

    Attributes:
        encoder: Folder of a Wan checkpoint with ``text_encoder/`` and ``tokenizer/``; may be null for prepared data.
        table: Table of features that ``bernini prepare`` writes beside the shards.
        rows: Context rows of a sample; shorter texts are filled with zero rows, which are attended.
    """

    encoder: str | None = None
    table: str | None = None
    rows: int = MAX_TOKENS


class Frozen:
    """A VAE and text features that belong neither in checkpoints nor in the optimizer, on the device that is asked for.

    Args:
        vae: Folder of the VAE.
        text: Where text features come from.
        dtype: Dtype of the weights.
    """

    def __init__(self, vae: str, text: TextConfig, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._device = torch.device("cpu")
        self._codec = LatentCodec.from_pretrained(vae, dtype)
        self._features = TextFeatures(text.encoder, text.table, dtype)

    def codec(self, device: torch.device) -> LatentCodec:
        """The VAE."""
        self._follow(device)
        return self._codec

    def features(self, device: torch.device) -> TextFeatures:
        """The text encoder and its tables."""
        self._follow(device)
        return self._features

    def _follow(self, device: torch.device) -> None:
        if self._device != device:  # to look through all weights in every step would take milliseconds
            for helper in (self._codec, self._features):
                helper.to(device)
            self._device = device


def text_rows(samples: Sequence[Conversation], features: TextFeatures, device: torch.device) -> list[Tensor]:
    """Text features ``[rows, dim]`` of each sample at their real length: prepared ones, else the text's."""
    texts = [renderer_text(s.task, s.prompt) for s in samples if "text" not in s.text_features]
    found = iter(features(texts, device))
    chosen = [s.text_features["text"] if "text" in s.text_features else next(found) for s in samples]
    return [rows.float() for rows in chosen]

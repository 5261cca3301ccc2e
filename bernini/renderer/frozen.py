"""The frozen VAE and text encoder of a module that trains or samples."""

from dataclasses import dataclass

import torch

from bernini.swapping import bring_for_calls
from bernini.text.encoder import MAX_TOKENS, TextFeatures
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
        offload: Keep both in host memory but while they work.
    """

    def __init__(self, vae: str, text: TextConfig, dtype: torch.dtype, offload: bool = False) -> None:
        self.dtype = dtype
        self._device = torch.device("cpu")
        self._codec = LatentCodec.from_pretrained(vae, dtype)
        self._features = TextFeatures(text.encoder, text.table, dtype)
        if offload:
            bring_for_calls(self._codec.vae, ["encode", "decode"], lambda: self._device)
            if self._features.encoder:
                bring_for_calls(self._features.encoder, ["encode"], lambda: self._device)

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

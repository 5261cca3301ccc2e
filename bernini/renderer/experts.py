"""One transformer, or two that share the noise levels between them, and the folders they are kept in."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bernini.checkpoints.parts import EXPERTS, TRANSFORMER_2, expert_boundary
from bernini.errors import ConfigError
from bernini.flow.noise import Expert
from bernini.pretrained import load_pretrained, load_stored
from bernini.renderer.segments import SegmentEncoding
from bernini.renderer.transformer import PackedWanTransformer3DModel

FOLDERS = {"high": "transformer", "single": "transformer", "low": "transformer_2"}

Choice = Literal["high", "low", "single", "both"]
"""Which experts a renderer has: one of two, the only one of a model without experts, or both."""


def experts_of(choice: Choice) -> dict[str, Expert]:
    """The experts of a choice, by the names of their transformers."""
    chosen: tuple[Expert, ...] = ("high", "low") if choice == "both" else (choice,)
    return {FOLDERS[expert]: expert for expert in chosen}


@dataclass
class Architecture:
    """Shape of a Wan transformer; the defaults are those of Wan 2.2 A14B.

    Attributes:
        num_layers: Blocks.
        num_attention_heads: Heads.
        attention_head_dim: Dimensions of a head.
        ffn_dim: Width of the feed-forward.
        text_dim: Width of the text features.
        freq_dim: Width of the sinusoidal timestep embedding.
        in_channels: Channels of the latent.
        segment_encoding: How sources are told apart; anything but ``sa3d`` is an experiment that only this class knows.
    """

    num_layers: int = 40
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    ffn_dim: int = 13824
    text_dim: int = 4096
    freq_dim: int = 256
    in_channels: int = 16
    segment_encoding: SegmentEncoding = "sa3d"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Architecture":
        """The shape that a transformer's ``config.json`` tells."""
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    def arguments(self) -> dict[str, Any]:
        """Arguments of the transformer's constructor; under ``sa3d`` they are those of diffusers' class too."""
        arguments = asdict(self) | {"out_channels": self.in_channels}
        if self.segment_encoding == "sa3d":
            del arguments["segment_encoding"]
        return arguments

    def build(self) -> PackedWanTransformer3DModel:
        """A transformer of this shape with random weights, on the current default device."""
        return PackedWanTransformer3DModel(**self.arguments())


SHAPES = {
    "14b": Architecture(),
    "1.3b": Architecture(num_layers=30, num_attention_heads=12, ffn_dim=8960),
}
"""Sizes that Wan has been released in."""


def load_transformer(
    folder: str | Path, expert: Expert, dtype: torch.dtype = torch.float32
) -> PackedWanTransformer3DModel:
    """Read one expert of a Wan or Bernini-R diffusers folder, or of a released folder of the full model.

    Args:
        folder: Folder with ``transformer/`` and, for two experts, ``transformer_2/``; or with ``bernini/`` and
            ``transformer_config.json``, of which the other expert and the planner are not read.
        expert: Which one.
        dtype: Weights' dtype; the modules that Wan keeps in fp32 stay so.

    Raises:
        CheckpointError: The folder is not there, has no such expert, or its weights do not fit its configuration.
    """
    root, part = Path(folder), EXPERTS[FOLDERS[expert]]
    if (config := part.config(root)) and config.parent == root:
        return load_stored(PackedWanTransformer3DModel, config, part.find(root), dtype, what=f"{expert} expert")
    return load_pretrained(
        PackedWanTransformer3DModel,
        root / part.name,
        dtype,
        what=f"{expert} expert",
        fix="point init_from at a diffusers folder with transformer/ (and transformer_2/), or a released one",
    )


class Experts(nn.Module):
    """The transformers under diffusers' names and the boundary between them.

    Args:
        transformer: The high-noise expert, or the only one.
        transformer_2: The low-noise expert.
        boundary: Sigma at which the low-noise expert takes over; 0 where one transformer does it all.
    """

    def __init__(
        self,
        transformer: PackedWanTransformer3DModel | None,
        transformer_2: PackedWanTransformer3DModel | None = None,
        boundary: float = 0.875,
    ) -> None:
        super().__init__()
        if transformer is None and transformer_2 is None:
            raise ConfigError("a renderer needs at least one transformer")
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "Experts":
        """Read every expert of a folder that `load_transformer` takes.

        The boundary is the one that the folder tells, 0.875 if it is silent.
        """
        root = Path(folder)
        if not ((root / FOLDERS["low"]).is_dir() or TRANSFORMER_2.config(root)):
            return cls(load_transformer(root, "single", dtype), boundary=0.0)
        return cls(load_transformer(root, "high", dtype), load_transformer(root, "low", dtype), expert_boundary(root))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``transformer/`` and ``transformer_2/``, as diffusers loads them."""
        for name, model in self.models.items():
            model.save_pretrained(Path(folder) / name)

    @property
    def models(self) -> dict[str, PackedWanTransformer3DModel]:
        """The transformers that are there, by their names in a diffusers folder."""
        named = {"transformer": self.transformer, "transformer_2": self.transformer_2}
        return {name: model for name, model in named.items() if model is not None}

    def is_low(self, timestep: float) -> bool:
        """Whether the low-noise expert is responsible for this timestep (0..1000)."""
        return timestep < 1000 * self.boundary

    def at(self, timestep: float) -> PackedWanTransformer3DModel:
        """The transformer that is responsible for this timestep (0..1000)."""
        model = self.transformer_2 if self.is_low(timestep) else self.transformer
        assert model is not None, f"no expert for timestep {timestep}"
        return model

"""ViT embeddings of a frozen vision tower, made once and stored beside the samples."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bernini.conversation import Conversation
from bernini.errors import ConfigError, DataError
from bernini.planner.model import load_tower
from bernini.planner.settings import PlannerSettings
from bernini.planner.tower import embed, fingerprint
from bernini.planner.vision import VisionConfig, look_at


class ViTEncoder:
    """The vision tower of a planner, and how it takes pixels.

    Args:
        tower: The tower.
        vision: Numbers of it.

    Raises:
        ConfigError: The tower takes other patches.
    """

    def __init__(self, tower: PreTrainedModel, vision: VisionConfig) -> None:
        own = {"patch": "patch_size", "temporal_patch": "temporal_patch_size", "merge": "spatial_merge_size"}
        for name, key in own.items():
            if (asked := getattr(vision, name)) != (has := getattr(tower.config, key)):
                raise ConfigError(
                    f"vision.{name} is {asked}, the planner's tower has {has}",
                    where=f"vision.{name}",
                    fix="use the vision settings that the planner is trained with",
                )
        self.tower, self.vision, self.fingerprint = tower, vision, fingerprint(tower)

    @classmethod
    def from_pretrained(cls, folder: str, vision: VisionConfig | None, device: torch.device) -> "ViTEncoder":
        """Read the tower of a planner's folder, in fp32, and its numbers unless they are given.

        Raises:
            CheckpointError: There is no planner, or its weights do not fit.
            ConfigError: The tower takes other patches.
        """
        vision = vision or PlannerSettings.of(Path(folder)).vision
        return cls(load_tower(folder).to(device), vision)  # type: ignore[arg-type]  # transformers wraps the method

    @torch.no_grad()
    def add_features(self, samples: Sequence[Conversation], dtype: torch.dtype) -> None:
        """Leave in each image and clip of samples what the tower makes of it, on the CPU.

        Features of an unnamed tower, as released data has them, are taken for those of this one.

        Raises:
            ConfigError: Features are there, made with other numbers.
            DataError: Features of an unnamed tower have another width.
            DataError: Pixels are not what the tower takes.
        """
        seen = [
            (message.media, visual)
            for sample in samples
            for message in sample.visual
            if message.media is not None and (visual := look_at(message, self.vision, sample.key)) is not None
        ]
        width: int = self.tower.config.out_hidden_size
        for media, visual in seen:
            if visual.features is not None and not visual.tower:
                if visual.features.shape[1] != width:
                    raise DataError(
                        f"embeddings have {visual.features.shape[1]} columns, the planner's tower makes {width}",
                        where=media.path or "", fix="name the planner whose tower made them",
                    )  # fmt: skip
                media.visual = replace(visual, tower=self.fingerprint)
        seen = [(media, visual) for media, visual in seen if visual.features is None]
        if not seen:
            return
        features = embed(self.tower, [visual for _, visual in seen]).to("cpu", dtype)
        for (media, visual), rows in zip(seen, features.split([visual.tokens for _, visual in seen]), strict=True):
            media.visual = replace(visual, patches=visual.patches[:0], features=rows, tower=self.fingerprint)

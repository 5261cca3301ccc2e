"""Condition dropout: what classifier-free guidance leaves out at inference is left out of some training samples."""

from dataclasses import dataclass, fields, replace

import torch

from bernini.conversation import Conversation
from bernini.errors import ConfigError


@dataclass
class DropoutConfig:
    """Rates at which a sample loses a whole modality; each is a coin of its own.

    Attributes:
        text: Text; the task's sentence stays.
        image: All source images.
        video: All source clips.
    """

    text: float = 0.1
    image: float = 0.1
    video: float = 0.1

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"dropout.{name} is {getattr(self, name)}", why="a rate lies between 0 and 1")

    def apply(self, sample: Conversation, generator: torch.Generator) -> Conversation:
        """Throw the three coins, and leave out what they say.

        Args:
            sample: A training sample; its targets stay.
            generator: On the CPU; it is drawn from once, whatever comes out.
        """
        rates = torch.tensor([self.text, self.image, self.video])
        text, image, video = (torch.rand(3, generator=generator) < rates).tolist()
        return leave_out(sample, text, image, video)


def leave_out(sample: Conversation, text: bool, image: bool, video: bool) -> Conversation:
    """A sample without its text, of which the task's sentence stays, its source images or its source clips."""
    kept = [m for m in sample.messages if m.media is None or m.is_target or not (video if m.is_video else image)]
    if not text:
        return replace(sample, messages=kept)
    features = {"text": sample.text_features["dropped"]} if "dropped" in sample.text_features else {}
    return replace(sample, messages=[m for m in kept if m.media is not None], text_features=features)

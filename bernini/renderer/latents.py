"""From conversations to the segments that the transformer is trained on."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bernini.conversation import Conversation, Media, Message
from bernini.errors import ConfigError, DataError
from bernini.flow.noise import add_noise
from bernini.renderer.packing import PackedSample, Segment, target_patches
from bernini.vae.codec import LatentCodec


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
        for name in ("text", "image", "video"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"dropout.{name} is {getattr(self, name)}", why="a rate lies between 0 and 1")

    def draw(self, generator: torch.Generator) -> "Dropped":
        """Throw the three coins."""
        text, image, video = (
            torch.rand(3, generator=generator) < torch.tensor([self.text, self.image, self.video])
        ).tolist()
        return Dropped(text, image, video)


@dataclass(frozen=True)
class Dropped:
    """What a sample goes without."""

    text: bool = False
    image: bool = False
    video: bool = False

    def keeps(self, message: Message) -> bool:
        """Whether a source stays."""
        return not (self.video if message.is_video else self.image)


def encode_media(codec: LatentCodec, media: Sequence[Media]) -> list[Tensor]:
    """Posterior ``[2C, t, h, w]`` of each clip, made now unless it was prepared; equal sizes share one call.

    Raises:
        DataError: A clip has neither pixels nor a posterior, or a posterior of another VAE.
    """
    posteriors: dict[int, Tensor] = {}
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for i, item in enumerate(media):
        if item.posterior is not None:
            if item.posterior.ndim != 4 or item.posterior.shape[0] != 2 * codec.channels:
                raise DataError(
                    f"a prepared latent has shape {list(item.posterior.shape)}",
                    where=item.path or "",
                    why=f"this VAE's posteriors are [{2 * codec.channels}, frames, height, width]",
                    fix="prepare the data with the VAE that model.init_args.vae names",
                )
            posteriors[i] = item.posterior
        elif item.pixels is not None:
            by_shape[item.pixels.shape].append(i)
        else:
            raise DataError("a message has neither pixels nor a latent", where=item.path or "")
    for members in by_shape.values():
        clips = torch.stack([item.pixels for i in members if (item := media[i]).pixels is not None])
        posteriors.update(zip(members, codec.posterior(clips), strict=True))
    return [posteriors[i] for i in range(len(media))]


@dataclass
class NoisedSample:
    """One training sample.

    Attributes:
        packed: Clean conditions, then noised targets.
        velocity: ``[tokens, channels]`` per target: noise minus data.
        sigma: Noise level of the targets.
        task: Task name.
        padding: Whether it only keeps a rank in step with the others and does not count.
    """

    packed: PackedSample
    velocity: list[Tensor]
    sigma: float
    task: str
    padding: bool


def noise_sample(
    conversation: Conversation,
    latents: Sequence[Tensor],
    context: Tensor,
    sigma: float,
    patch: tuple[int, int, int],
    generator: torch.Generator,
) -> NoisedSample:
    """Noise the targets of a sample and number its sources.

    Args:
        conversation: The sample; its dropped sources are gone already, so that ids are compact.
        latents: ``[C, T, H, W]`` normalised latent of each visual message, in order.
        context: ``[rows, text_dim]``.
        sigma: Noise level.
        patch: Patch size of the model.
        generator: Generator of the noise, on the latents' device.
    """
    visual = [m for m in conversation.messages if m.is_image or m.is_video]
    conditions, targets, velocity, source_id = [], [], [], 0
    for message, x0 in zip(visual, latents, strict=True):
        if message.is_target:
            noise = torch.randn(x0.shape, generator=generator, device=x0.device)
            targets.append(Segment(add_noise(x0, noise, sigma), 0))
            velocity.append(target_patches(noise - x0, patch))
        else:
            source_id += 1
            conditions.append(Segment(x0, source_id))
    return NoisedSample(
        PackedSample(conditions + targets, context, 1000 * sigma),
        velocity,
        sigma,
        task=conversation.spec.name,
        padding=bool(conversation.info.get("padding")),
    )

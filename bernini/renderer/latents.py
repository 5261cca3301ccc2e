"""From conversations to the segments that the transformer is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bernini.conversation import Conversation, Media
from bernini.errors import DataError
from bernini.flow.noise import add_noise
from bernini.renderer.packing import PackedSample, Segment, target_patches
from bernini.stacking import map_stacked
from bernini.vae.codec import PIXELS_AT_ONCE, LatentCodec


def encode_media(codec: LatentCodec, media: Sequence[Media]) -> list[Tensor]:
    """Posterior ``[2C, t, h, w]`` of each clip, made now unless it was prepared; small clips of one size share a call.

    Raises:
        DataError: A clip has neither pixels nor a posterior, or a posterior of another VAE.
    """
    posteriors: dict[int, Tensor] = {}
    raw: list[int] = []
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
            raw.append(i)
        else:
            raise DataError("a message has neither pixels nor a latent", where=item.path or "")
    clips = [item.pixels for i in raw if (item := media[i]).pixels is not None]
    posteriors.update(zip(raw, map_stacked(codec.posterior, clips, at_once=PIXELS_AT_ONCE), strict=True))
    return [posteriors[i] for i in range(len(media))]


def latent_shape(codec: LatentCodec, media: Media) -> tuple[int, int, int, int]:
    """``(C, t, h, w)`` of a clip's latent, which need not be made for this.

    Raises:
        DataError: The clip has neither pixels nor a posterior, or a size that the VAE cannot encode.
    """
    if media.posterior is not None:
        _, frames, height, width = media.posterior.shape
        return codec.channels, frames, height, width
    if media.pixels is None:
        raise DataError("a message has neither pixels nor a latent", where=media.path or "")
    return codec.latent_shape(*media.pixels.shape[1:])


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


def noise_samples(
    conversations: Sequence[Conversation],
    latents: Sequence[Sequence[Tensor]],
    contexts: Sequence[Tensor],
    sigmas: Sequence[float],
    patch: tuple[int, int, int],
    generators: Sequence[torch.Generator],
) -> list[NoisedSample]:
    """Noise the targets of samples and number their sources.

    Args:
        conversations: The samples; dropped sources are gone already, so that ids are compact.
        latents: For each sample, the normalised latent ``[C, T, H, W]`` of each visual message, in order.
        contexts: ``[rows, text_dim]`` of each sample.
        sigmas: Noise level of each sample.
        patch: Patch size of the model.
        generators: Generator of each sample's noise, on the latents' device.
    """
    device = contexts[0].device
    drawn = [
        (x0, torch.randn(x0.shape, generator=generator, device=device), level)
        for sample, own, level, generator in zip(
            conversations, latents, torch.tensor(sigmas, device=device).unbind(), generators, strict=True
        )
        for message, x0 in zip(sample.visual, own, strict=True)
        if message.is_target
    ]
    clean, noise, level = ([*column] for column in zip(*drawn, strict=True))
    noised = iter(map_stacked(lambda x0, eps, s: add_noise(x0, eps, s.view(-1, 1, 1, 1, 1)), clean, noise, level))
    velocities = iter(map_stacked(lambda x0, eps: target_patches(eps - x0, patch), clean, noise))

    found = []
    for sample, own, context, sigma in zip(conversations, latents, contexts, sigmas, strict=True):
        conditions = [x0 for message, x0 in zip(sample.visual, own, strict=True) if not message.is_target]
        segments = [Segment(x0, number) for number, x0 in enumerate(conditions, 1)]
        targets = [Segment(next(noised), 0) for _ in sample.targets]
        found.append(
            NoisedSample(
                PackedSample(segments + targets, context, 1000 * sigma),
                [next(velocities) for _ in targets],
                sigma,
                task=sample.spec.name,
                padding=bool(sample.info.get("padding")),
            )
        )
    return found

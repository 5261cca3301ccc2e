"""A step of one expert: samples -> latents -> noise -> losses."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bernini.conversation import Conversation
from bernini.flow.noise import Expert, NoiseConfig, velocity_losses
from bernini.renderer.latents import NoisedSample, encode_media, noise_samples
from bernini.renderer.packing import PackedSample, Segment, pack
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.stacking import map_stacked
from bernini.vae.codec import LatentCodec


def draw_latents(
    codec: LatentCodec,
    samples: Sequence[Conversation],
    generators: Sequence[torch.Generator],
    most_frames: int | None = None,
) -> list[list[Tensor]]:
    """Sampled, normalised latents of all visual messages.

    Args:
        codec: The VAE.
        samples: Conversations with pixels or prepared posteriors.
        generators: Generator of each sample's draws, on the codec's device.
        most_frames: Longer latents are cut.

    Returns:
        For each sample, ``[C, T, H, W]`` of each visual message, in order.
    """
    posteriors = encode_media(codec, [m for s in samples for m in s.media()])
    owners = [g for s, g in zip(samples, generators, strict=True) for _ in s.media()]
    noise = [
        torch.randn((codec.channels, *p.shape[1:]), generator=g, device=g.device)
        for p, g in zip(posteriors, owners, strict=True)
    ]
    latents = iter(map_stacked(codec.normalize, posteriors, noise))
    return [[next(latents)[:, :most_frames] for _ in s.media()] for s in samples]


def target_losses(
    model: PackedWanTransformer3DModel,
    expert: Expert,
    samples: Sequence[Conversation],
    latents: Sequence[Sequence[Tensor]],
    contexts: Sequence[Tensor],
    noise: NoiseConfig,
    hosts: Sequence[torch.Generator],
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, list[NoisedSample]]:
    """Velocity losses of an expert, in one packed forward.

    Args:
        model: The expert.
        expert: Its noise levels.
        samples: Conversations with targets.
        latents: Those of `draw_latents`.
        contexts: ``[rows, text_dim]`` of each sample.
        noise: How timesteps are drawn.
        hosts: Generator of each sample's noise level, on the CPU.
        generators: Generator of each sample's noise, on the latents' device.

    Returns:
        ``[targets]`` fp32, and the samples that they belong to, in their order.
    """
    sigmas = noise.draw_sigmas([s.spec for s in samples], expert, hosts)
    noised = noise_samples(samples, latents, contexts, sigmas, model.patch, generators)
    # Neighbours of equal lengths share one call of attention.
    noised.sort(key=lambda one: [math.prod(s.latent.shape) for s in one.packed.segments])
    packed = pack([n.packed for n in noised], model.patch)
    predicted = model(packed)[packed.target_index]
    velocity = torch.cat([v for n in noised for v in n.velocity])
    return velocity_losses(predicted, velocity, packed.target_lengths), noised


def idle_pass(model: PackedWanTransformer3DModel, context: Tensor) -> Tensor:
    """Zero, through all of a model and a context: ranks that share weights or gradients stay in step.

    Args:
        model: One expert.
        context: ``[rows, text_dim]``, at least one row.
    """
    latent = torch.zeros(model.config["in_channels"], *model.patch, device=context.device)
    packed = pack([PackedSample([Segment(latent, 0)], context, 0.0)], model.patch)
    return 0 * model(packed).float().sum()

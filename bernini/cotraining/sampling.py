"""Rendering with plans while a module trains."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bernini.conversation import Conversation, Media
from bernini.flow.guidance import Context
from bernini.planner.vision import TargetSize
from bernini.renderer.experts import Experts
from bernini.renderer.latents import encode_media, latent_shape
from bernini.renderer.sampling import Progress, RenderRequest, SamplingConfig, Source, render
from bernini.stacking import map_stacked
from bernini.vae.codec import LATENTS_AT_ONCE, LatentCodec

Shape = tuple[int, int, int, int]


def latent_shape_of(codec: LatentCodec, conversation: Conversation, config: SamplingConfig) -> Shape:
    """``(C, T, H, W)`` of what is to be sampled: as the target, else as the source to be edited, else as set."""
    edited = [m for m in conversation.sources if m.is_video or conversation.task == "i2i"]
    media = next((m.media for m in [*conversation.targets, *edited] if m.media), None)
    if media is None:
        frames = 1 if conversation.spec.target == "image" else config.frames
        return codec.latent_shape(frames, config.height, config.width)
    return latent_shape(codec, media)


def pixel_size(codec: LatentCodec, conversation: Conversation, shape: Shape) -> TargetSize:
    """What the planner is told of a target's size, at the frame rate of the clips that are there, else the default."""
    rates = [m.media.fps for m in conversation.visual if m.media and m.media.fps]
    _, frames, height, width = shape
    size = TargetSize((frames - 1) * codec.temporal + 1, height * codec.spatial, width * codec.spatial)
    return replace(size, fps=rates[0]) if rates else size


@torch.no_grad()
def render_planned(
    experts: Experts,
    codec: LatentCodec,
    conversations: Sequence[Conversation],
    shapes: Sequence[Shape],
    contexts: Sequence[Mapping[Context, Tensor]],
    config: SamplingConfig,
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> list[Tensor]:
    """Sample clips.

    Args:
        experts: The transformers.
        codec: The VAE.
        conversations: What to make; sources may be pixels or prepared latents.
        shapes: ``(C, T, H, W)`` of each latent.
        contexts: Those of `bernini.contexts.planned_contexts`, of each.
        config: How clips are sampled.
        seeds: Seed of each clip's noise.
        progress: Called with steps done and steps in all.

    Returns:
        ``[3, T, H, W]`` uint8 of each.

    Raises:
        DataError: Sources are not those of the task, or have no pixels.
    """
    starts_low = experts.transformer is None  # from the noised truth
    shown = [
        [m for m in c.check(targets=False).visual if not m.is_target or (starts_low and m.media)] for c in conversations
    ]
    posteriors = encode_media(codec, [m.media or Media() for messages in shown for m in messages])
    latents = iter(map_stacked(codec.normalize, posteriors))
    requests = []
    for conversation, messages, shape, own, seed in zip(conversations, shown, shapes, contexts, seeds, strict=True):
        known = [(message, next(latents)) for message in messages]
        sources = [Source(x, m.is_video) for m, x in known if not m.is_target]
        truth = next((x for m, x in known if m.is_target), None)
        mode = config.mode or conversation.spec.planned_guidance
        requests.append(RenderRequest(shape, sources, dict(own), mode, seed, truth))
    device = codec.mean.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        rendered = render(experts, requests, config, progress)
    return map_stacked(codec.decode, rendered, at_once=LATENTS_AT_ONCE)

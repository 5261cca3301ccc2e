"""From conversations to pixels: what training samples with, and the pipeline."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bernini.contexts import planned_contexts
from bernini.conversation import Conversation, Media, Message
from bernini.flow.guidance import Context
from bernini.planner.planning import Plan
from bernini.planner.vision import TargetSize
from bernini.renderer.experts import Experts
from bernini.renderer.latents import encode_media, latent_shape
from bernini.renderer.packing import pad_context
from bernini.renderer.sampling import OnStep, RenderRequest, SamplingConfig, Source, render
from bernini.stacking import map_stacked
from bernini.text.prompt import renderer_text
from bernini.vae.codec import LATENTS_AT_ONCE, LatentCodec

Features = Callable[[Iterable[str], torch.device], list[Tensor]]
"""Gives the features ``[rows, dim]`` of texts, on a device."""


@dataclass
class Prediction:
    """A sampled clip.

    Attributes:
        conversation: What was asked for.
        pixels: ``[3, T, H, W]`` uint8.
    """

    conversation: Conversation
    pixels: Tensor


def text_rows(conversations: Sequence[Conversation], features: Features, device: torch.device) -> list[Tensor]:
    """Text features ``[rows, dim]`` fp32 of each conversation, not padded: prepared ones, else its text's."""
    texts = [renderer_text(c.task, c.prompt) for c in conversations if "text" not in c.text_features]
    found = iter(features(texts, device))
    chosen = (c.text_features["text"] if "text" in c.text_features else next(found) for c in conversations)
    return [rows.float() for rows in chosen]


def followed(conversation: Conversation) -> Media | None:
    """What gives the output its size: the target if it is known, else the source that is edited, if there is one."""
    edited = [m for m in conversation.sources if m.is_video or conversation.task == "i2i"]
    return next((m.media for m in [*conversation.targets, *edited] if m.media), None)


@dataclass
class Renderer:
    """Makes the image or clip of each conversation; it owns none of its parts.

    Attributes:
        experts: The transformers.
        codec: The VAE; it is on the device that computes.
        features: The text encoder.
        rows: Context rows of a text; shorter ones are filled with zero rows, as is what text and planner make together.
    """

    experts: Experts
    codec: LatentCodec
    features: Features
    rows: int

    @torch.no_grad()
    def __call__(
        self,
        conversations: Sequence[Conversation],
        config: SamplingConfig,
        seeds: Sequence[int],
        plans: Sequence[Plan] | None = None,
        on_step: OnStep | None = None,
    ) -> list[Tensor]:
        """Sample; but for rounding, no output depends on what else is in the batch.

        A target in a conversation only gives the size, except for a lone low-noise expert, which starts from it; where
        ``info["blank_target"]`` is true, it is nothing to start from.

        Args:
            conversations: What to make; sources may be pixels or prepared latents.
            config: How; its own seed is not looked at.
            seeds: Seed of each one's noise.
            plans: Plan of each one, for the modes of the full model.
            on_step: Called after every step.

        Returns:
            ``[3, T, H, W]`` uint8 of each.

        Raises:
            ConfigError: The mode is unknown, or does not go with plans or the want of them, or plans are not as wide as
                text features.
            DataError: Sources are not those of the task, have no pixels, or a size that does not fit the VAE.
        """
        if not conversations:
            return []
        shown = [self._shown(c.check(targets=False)) for c in conversations]
        posteriors = encode_media(self.codec, [m.media or Media() for messages in shown for m in messages])
        latents = iter(map_stacked(self.codec.normalize, posteriors))
        contexts = self._contexts(conversations, config.negative_prompt, plans)
        requests = []
        for conversation, messages, own, seed in zip(conversations, shown, contexts, seeds, strict=True):
            known = [(message, next(latents)) for message in messages]
            sources = [Source(x, m.is_video) for m, x in known if not m.is_target]
            truth = next((x for m, x in known if m.is_target and not conversation.info.get("blank_target")), None)
            spec = conversation.spec
            mode = config.mode or (spec.guidance if plans is None else spec.planned_guidance)
            shape = self.latent_shape(conversation, config)
            requests.append(RenderRequest(shape, sources, own, mode, seed, truth))
        device = self._device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            rendered = render(self.experts, requests, config, on_step)
        return map_stacked(self.codec.decode, rendered, at_once=LATENTS_AT_ONCE)

    def latent_shape(self, conversation: Conversation, config: SamplingConfig) -> tuple[int, int, int, int]:
        """``(C, T, H, W)`` of the latent that is to be sampled: as what it follows, else as set.

        Raises:
            DataError: What it follows has neither pixels nor a posterior, or a size that does not fit the VAE.
        """
        media = followed(conversation)
        if media is None:
            frames = 1 if conversation.spec.target == "image" else config.frames
            return self.codec.latent_shape(frames, config.height, config.width)
        return latent_shape(self.codec, media)

    def target_size(
        self, conversation: Conversation, config: SamplingConfig, fps: float = TargetSize.fps
    ) -> TargetSize:
        """What a planner is told of that: pixels, and the frame rate of what it follows.

        Args:
            conversation: What is asked for.
            config: Says the size of what follows nothing.
            fps: Its frame rate.

        Raises:
            DataError: As `latent_shape`.
        """
        _, frames, height, width = self.latent_shape(conversation, config)
        codec, media = self.codec, followed(conversation)
        return TargetSize(
            (frames - 1) * codec.temporal + 1,
            height * codec.spatial,
            width * codec.spatial,
            media.fps if media and media.fps else fps,
        )

    @property
    def _device(self) -> torch.device:
        return self.codec.mean.device

    def _shown(self, conversation: Conversation) -> list[Message]:
        """Messages whose latents sampling needs."""
        starts_low = self.experts.transformer is None
        return [m for m in conversation.visual if not m.is_target or (starts_low and m.media)]

    def _contexts(
        self, conversations: Sequence[Conversation], negative_prompt: str, plans: Sequence[Plan] | None
    ) -> list[dict[Context, Tensor]]:
        negative = self.features([negative_prompt], self._device)[0].float()
        positive = text_rows(conversations, self.features, self._device)
        if plans is not None:
            return [
                planned_contexts(plan, own[: self.rows], negative[: self.rows], self.rows)
                for plan, own in zip(plans, positive, strict=True)
            ]
        padded = pad_context(negative, self.rows)
        return [
            {Context("positive", plan=False): pad_context(own, self.rows), Context("negative", plan=False): padded}
            for own in positive
        ]

"""Requests of users as conversations: a task, a text, and media of any size, read and made to fit."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from bernini.conversation import Conversation, Media, Message
from bernini.errors import DataError
from bernini.media import fit, frame_rule, read_image, read_video
from bernini.presets import Settings
from bernini.tasks import get_task

if TYPE_CHECKING:
    from PIL.Image import Image

Clip = Union[str, Path, Tensor]  # noqa: UP007  beside its sibling
Picture = Union[str, Path, Tensor, "Image"]


def ask(
    task: str, prompt: str, videos: Sequence[Clip] = (), images: Sequence[Picture] = (), key: str = ""
) -> Conversation:
    """Write a request as a conversation, in the order of the released pipeline: clips, images, text.

    Args:
        task: Name in the task table.
        prompt: What to make, or to do.
        videos: Files, or ``[3, T, H, W]`` uint8 tensors.
        images: Files, Pillow's images, or ``[3, 1, H, W]`` uint8 tensors.
        key: Name of the request, for errors.

    Raises:
        ConfigError: The task is unknown.
        DataError: Media are not those that the task takes, or tensors have another form.
    """
    messages = [
        *(Message("video", media=_media(clip)) for clip in videos),
        *(Message("image", media=_media(image)) for image in images),
        Message("text", text=prompt),
    ]
    for message in messages:
        if message.media and message.media.pixels is not None:
            _check(message.media.pixels, is_image=message.is_image)
    return Conversation(get_task(task).name, messages, key=key).check(targets=False)


def read(request: Conversation, settings: Settings) -> None:
    """Read the media of a request and make them fit the model.

    Clips are sampled at ``settings.fps``, up to ``settings.frames`` of them; tensors are taken to have that rate. All
    keep their aspect within ``max_edge`` and ``min_edge``.

    Args:
        request: What `ask` wrote.
        settings: Sizes and rates.

    Raises:
        DataError: A file is missing or damaged.
    """
    for message in request.sources:
        assert message.media is not None
        media = message.media if message.media.pixels is not None else _read(message, message.media, settings)
        if message.is_video and not media.fps:
            media = _sampled(media, settings)
        message.media = fit(media, settings.max_edge, settings.min_edge)


def _media(given: "Clip | Picture") -> Media:
    if isinstance(given, str | Path):
        return Media(path=str(given))
    if isinstance(given, Tensor):
        return Media(pixels=given)
    import numpy as np

    return Media(pixels=torch.from_numpy(np.array(given.convert("RGB"))).permute(2, 0, 1)[:, None])


def _check(pixels: Tensor, is_image: bool) -> None:
    clip = pixels.ndim == 4 and len(pixels) == 3 and pixels.numel() > 0
    if pixels.dtype != torch.uint8 or not clip or (is_image and pixels.shape[1] != 1):
        what, wanted = ("an image", "[3, 1, H, W]") if is_image else ("a clip", "[3, T, H, W]")
        raise DataError(f"{what} of {list(pixels.shape)} {pixels.dtype}", why=f"pixels are {wanted} uint8")


def _read(message: Message, media: Media, settings: Settings) -> Media:
    assert media.path is not None
    if message.is_image:
        return read_image(media.path)
    return read_video(media.path, fps=settings.fps, max_frames=settings.frames)


def _sampled(media: Media, settings: Settings) -> Media:
    """A tensor as `read_video` would have read it from a file."""
    assert media.pixels is not None
    _, frames, height, width = media.pixels.shape
    rule = frame_rule(frames, settings.fps, settings.fps, settings.frames)
    source = {"height": height, "width": width, "frames": rule.covered, "fps": settings.fps, "sampled": rule.sampled}
    return Media(pixels=media.pixels[:, list(rule.indices)], fps=settings.fps, source=source)

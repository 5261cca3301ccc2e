"""One conversation to the members of a sample in a shard, and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from bernini.conversation import Conversation, Media, Message
from bernini.errors import DataError
from bernini.media import encode_image, encode_video, read_image, read_video, resize
from bernini.planner.vision import VisionConfig, Visual
from datamodules.buckets import Bounds
from datamodules.decoder import decoder

SCHEMA = 1
ROW, TENSORS = "json", "prepared.safetensors"
WHOLE = Bounds()
_STORED = ("pixels", "posterior", "vit")
_PREPARE = "write the shards again with `bernini prepare`"


def encode(conversation: Conversation, *, lossless: bool = False) -> dict[str, bytes]:
    """Members of a sample, suffix -> bytes.

    ``json`` holds the released row with member names as paths, the rate and source geometry of each visual, ``info``
    and the schema version. Visual ``n`` of the messages becomes ``vN.mp4`` or ``iN.png`` when it has pixels; a visual
    that has neither pixels nor features is the file at its path, copied byte for byte. Posteriors, ViT features and
    text features become ``posterior.N``, ``vit.N`` and ``text.ROLE`` of ``prepared.safetensors``; the row says what
    the ViT features are of.

    Args:
        conversation: The sample.
        lossless: Keep the exact pixels of clips.

    Raises:
        DataError: A visual has no data, or not of the kind that its message says.
    """
    members: dict[str, bytes] = {}
    tensors: dict[str, Tensor] = {f"text.{role}": rows for role, rows in conversation.text_features.items()}
    messages: list[Message] = []
    visuals: list[dict[str, Any]] = []
    for message in conversation.messages:
        if not (message.is_image or message.is_video):
            messages.append(message)
            continue
        media, number = message.media or Media(), len(visuals)
        visual: dict[str, Any] = {"fps": media.fps, "source": media.source}
        if media.posterior is not None:
            visual["posterior"] = f"posterior.{number}"
            tensors[visual["posterior"]] = media.posterior
        if media.visual is not None and media.visual.features is not None:
            visual["vit"] = f"vit.{number}"
            visual["seen"] = {
                "grid": media.visual.grid,
                "tower": media.visual.tower,
                "vision": asdict(media.visual.config),
            }
            tensors[visual["vit"]] = media.visual.features
        if media.pixels is not None or not visual.keys() & {"posterior", "vit"}:
            suffix, data = _file(message, media, lossless, f"{conversation.key}, visual {number}")
            visual["pixels"] = f"{'v' if message.is_video else 'i'}{number}.{suffix}"
            members[visual["pixels"]] = data
        visuals.append(visual)
        messages.append(
            replace(message, media=replace(media, path=next(visual[kind] for kind in _STORED if kind in visual)))
        )
    row = replace(conversation, messages=messages).to_row()
    row |= {"schema": SCHEMA, "visuals": visuals, "info": conversation.info}
    members[ROW] = json.dumps(row).encode()
    if tensors:
        members[TENSORS] = save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()})
    return members


def _file(message: Message, media: Media, lossless: bool, where: str) -> tuple[str, bytes]:
    """Suffix and bytes of a visual."""
    if media.pixels is not None:
        if message.is_image:
            return "png", encode_image(media.pixels)
        return "mp4", encode_video(media.pixels, media.fps, lossless=lossless)
    if media.path is None:
        raise DataError("a visual has neither pixels nor a file", where=where, fix="give it one of them")
    path, suffixes = Path(media.path), ("mp4",) if message.is_video else ("png", "jpg")
    suffix = path.suffix.lower().lstrip(".").replace("jpeg", "jpg")
    if suffix not in suffixes:
        raise DataError(f"a file that is not {' or '.join(suffixes)} cannot be copied", where=str(path), fix=_PREPARE)
    if not path.is_file():
        raise DataError("the file does not exist", where=str(path), fix="check the path")
    return suffix, path.read_bytes()


def decode(
    members: Mapping[str, bytes],
    *,
    key: str,
    where: str,
    bounds: Bounds = WHOLE,
) -> Conversation:
    """Read a sample back.

    Args:
        members: Suffix -> bytes, as `encode` made them.
        key: Sample key.
        where: Shard and key, for errors.
        bounds: What is taken of pixels: a longer clip loses its end, larger frames are resized.

    Returns:
        The conversation, with ``pixels``, ``posterior`` and ``visual`` as far as they were stored.

    Raises:
        DataError: A member is missing or damaged.
    """
    row, tensors = parse_row(members, where), parse_tensors(members, where)
    conversation = Conversation.from_row(row, key=key)
    conversation.info = row.get("info", {})
    conversation.text_features = {n.removeprefix("text."): t for n, t in tensors.items() if n.startswith("text.")}
    visuals = [m for m in conversation.messages if m.is_image or m.is_video]
    if len(visuals) != len(row["visuals"]):
        raise DataError(f"{len(visuals)} visual messages, {len(row['visuals'])} visuals", where=f"{where}.{ROW}")
    for message, visual in zip(visuals, row["visuals"], strict=True):
        for kind in _STORED:
            name, stored = visual.get(kind), members if kind == "pixels" else tensors
            if name is not None and name not in stored:
                raise DataError(
                    f"{name} of the sample is missing", where=where, why="the shard is damaged", fix=_PREPARE
                )
        media = Media(fps=visual["fps"], source=visual["source"])
        if name := visual.get("pixels"):
            media = _read(message, visual, members[name], f"{where}.{name}", bounds)
        media.posterior = tensors.get(visual.get("posterior", ""))
        if name := visual.get("vit"):
            media.visual = _visual(visual["seen"], message.is_video, tensors[name], where)
        if message.media is not None:
            message.media = replace(media, path=message.media.path, options=message.media.options)
    return conversation


def parse_row(members: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """The JSON row of a sample.

    Raises:
        DataError: It is missing, is no JSON object, or has another schema version.
    """
    if ROW not in members:
        raise DataError("the sample has no row", where=f"{where}.{ROW}", why="not a shard of ours", fix=_PREPARE)
    try:
        row = json.loads(bytes(members[ROW]))
    except ValueError as error:
        raise DataError(f"the row is not JSON: {error}", where=f"{where}.{ROW}", fix=_PREPARE) from error
    if not isinstance(row, dict) or row.get("schema") != SCHEMA:
        found = row.get("schema") if isinstance(row, dict) else None
        raise DataError(f"schema {found} instead of {SCHEMA}", where=f"{where}.{ROW}", fix=_PREPARE)
    if not isinstance(row.get("task"), str) or not isinstance(row.get("visuals"), list):
        raise DataError("the row has no task or no visuals", where=f"{where}.{ROW}", fix=_PREPARE)
    return row


def parse_tensors(members: Mapping[str, bytes], where: str) -> dict[str, Tensor]:
    """Prepared features of a sample by name, none if it has no such member.

    Raises:
        DataError: They are damaged.
    """
    try:
        return load_tensors(bytes(members[TENSORS])) if TENSORS in members else {}
    except (SafetensorError, ValueError) as error:
        raise DataError(f"damaged tensors: {error}", where=f"{where}.{TENSORS}", fix=_PREPARE) from error


def _read(message: Message, visual: dict[str, Any], data: bytes, where: str, bounds: Bounds) -> Media:
    if message.is_image:
        media = read_image(bytes(data), where=where, limits=bounds.limits)
    else:
        decode = decoder(bounds.limits)
        media = read_video(bytes(data), max_frames=bounds.max_frames, where=where, decode=decode)
        media.fps = visual["fps"] or media.fps
    media.source = _source(visual["source"], media.source)
    assert media.pixels is not None
    media.pixels = resize(media.pixels, *bounds.resized(*media.pixels.shape[2:]))
    return media


def _visual(seen: dict[str, Any], is_video: bool, features: Tensor, where: str) -> Visual:
    """What a vision tower made of a visual."""
    try:
        config = VisionConfig.from_json(seen["vision"])
        t, h, w = seen["grid"]
        return Visual(torch.empty(0, config.columns), (t, h, w), is_video, config, features, seen["tower"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the row does not say what ViT features are of: {error!r}", where=f"{where}.{ROW}", fix=_PREPARE
        ) from error


def _source(original: dict[str, float], stored: dict[str, float]) -> dict[str, float]:
    """Geometry of the original file, shortened as the clip in the shard was shortened when it was read."""
    if not original:
        return stored
    whole = original.get("sampled", original["frames"])
    sampled = min(whole, stored["sampled"])
    frames = round(original["frames"] * sampled / whole)
    return {**original, "sampled": sampled, "frames": frames}

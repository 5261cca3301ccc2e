"""The one record that data, planner and renderer share: a task and an ordered list of messages.

The JSON form is the released parquet row: ``inputs`` is a JSON string with the message list, ``images`` and ``videos``
list the media files in the order in which messages of that kind appear.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from bernini.errors import DataError
from bernini.tasks import Task, get_task

if TYPE_CHECKING:
    from bernini.planner.vision import Visual

MessageType = Literal["text", "cot_text", "image", "image_gen", "video", "frame_gen", "video_gen", "special_token"]
IMAGE_TYPES = ("image", "image_gen")
VIDEO_TYPES = ("video", "frame_gen", "video_gen")
TARGET_TYPES = ("image_gen", "frame_gen", "video_gen")


@dataclass
class Media:
    """An image or a clip: where it lies, what it holds, or both.

    Attributes:
        path: File it was read from, as written in the row.
        pixels: ``[3, T, H, W]`` uint8; an image has ``T = 1``.
        posterior: ``[2C, t, h, w]`` mean and log-variance of the VAE, not normalised.
        visual: What the planner's vision tower takes of ``pixels``, or made of them.
        fps: Frames per second of ``pixels``; 0 for an image.
        source: Geometry of the file that ``pixels`` was sampled from: ``height``, ``width``, ``frames``, ``fps``, and
            ``sampled``, the frames of ``pixels`` that are not padding.
        options: Further keys of the released row (``duration``, ``crop_method``), kept as they are.
    """

    path: str | None = None
    pixels: Tensor | None = None
    posterior: Tensor | None = None
    visual: "Visual | None" = None
    fps: float = 0.0
    source: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def prepared(self) -> bool:
        """Whether features are there, for which no pixels need be read."""
        return self.posterior is not None or (self.visual is not None and self.visual.features is not None)

    def tensors(self) -> list[Tensor]:
        """All tensors that are there."""
        seen = (self.visual.patches, self.visual.features) if self.visual else ()
        return [x for x in (self.pixels, self.posterior, *seen) if x is not None]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Media":
        """A copy with every tensor on ``device``."""
        pixels, posterior = (
            None if x is None else x.to(device, non_blocking=non_blocking) for x in (self.pixels, self.posterior)
        )
        visual = self.visual and self.visual.to(device, non_blocking)
        return replace(self, pixels=pixels, posterior=posterior, visual=visual)


@dataclass
class Message:
    """One item of a conversation.

    Attributes:
        type: What the item is; ``*_gen`` types are generation targets.
        text: Text of ``text`` and ``cot_text`` messages, or a special token.
        media: Image or clip of the visual types.
        has_loss: Whether the item is learned; ``None`` takes the documented default, true for ``*_gen``.
    """

    type: MessageType
    text: str | None = None
    media: Media | None = None
    has_loss: bool | None = None

    def __post_init__(self) -> None:
        if self.type not in get_args(MessageType):
            raise DataError(
                f"unknown message type {self.type!r}", why=f"the types are {', '.join(get_args(MessageType))}"
            )
        if self.has_loss is None:
            self.has_loss = self.type in TARGET_TYPES

    @property
    def is_image(self) -> bool:
        """Whether the message is an image, source or target."""
        return self.type in IMAGE_TYPES

    @property
    def is_video(self) -> bool:
        """Whether the message is a clip, source or target."""
        return self.type in VIDEO_TYPES

    @property
    def is_target(self) -> bool:
        """Whether the message is a visual that the model has to make."""
        return bool(self.has_loss) and (self.is_image or self.is_video)


@dataclass
class Conversation:
    """A task and its messages, in the order in which segments are numbered.

    Attributes:
        task: Name in the task table.
        messages: Ordered items.
        key: Sample key in its shard.
        text_features: Encoded text of the renderer by role, each ``[rows, dim]``: ``text`` and, when the text is
            dropped, ``dropped``. Empty unless the sample was prepared.
        info: Anything else that travels with the sample, plain JSON.
    """

    task: str
    messages: list[Message]
    key: str = ""
    text_features: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> Task:
        """Row of the task table."""
        return get_task(self.task)

    @property
    def prompt(self) -> str:
        """The user's text: reasoning and texts without loss, joined by a blank, as the released trainer does."""
        return " ".join(m.text or "" for m in self.messages if _is_prompt(m))

    def with_prompt(self, text: str) -> "Conversation":
        """A copy that says something else: one text, in front of what is learned, for all that `prompt` joins.

        Features of the old text are left out.
        """
        kept = [m for m in self.messages if not _is_prompt(m)]
        place = next((number for number, m in enumerate(kept) if m.has_loss), len(kept))
        messages = [*kept[:place], Message("text", text), *kept[place:]]
        features = {role: rows for role, rows in self.text_features.items() if role != "text"}
        return replace(self, messages=messages, text_features=features)

    @property
    def visual(self) -> list[Message]:
        """Images and clips, sources and targets, in order."""
        return [m for m in self.messages if m.is_image or m.is_video]

    @property
    def sources(self) -> list[Message]:
        """Visual messages that condition, in order."""
        return [m for m in self.visual if not m.is_target]

    @property
    def targets(self) -> list[Message]:
        """Visual messages to be made, in order."""
        return [m for m in self.messages if m.is_target]

    def media(self) -> Iterator[Media]:
        """Every image and clip, in order."""
        return (m.media for m in self.messages if m.media is not None)

    def check(self, targets: bool = True) -> "Conversation":
        """Compare the messages with the task table.

        Args:
            targets: Whether a target is required, as for training.

        Raises:
            ConfigError: The task is unknown.
            DataError: The number of sources or targets is not the task's.
        """
        spec = self.spec
        for kind, (least, most), found in (
            ("video", spec.videos, sum(m.is_video for m in self.sources)),
            ("image", spec.images, sum(m.is_image for m in self.sources)),
        ):
            if not least <= found <= most:
                asked = str(least) if least == most else f"{least} to {most}"
                raise DataError(
                    f"task {spec.name} takes {asked} source {kind}(s), the sample has {found}",
                    where=self.key,
                    fix="change the sample's task or its media",
                )
        if targets and not self.targets:
            raise DataError("the sample has no target", where=self.key, fix=f"add a {spec.target} to learn")
        return self

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Conversation":
        """A copy with every tensor on ``device``; itself, if they are there already."""
        device = torch.device(device)
        tensors = [x for media in self.media() for x in media.tensors()]
        if all(x.device == device for x in (*tensors, *self.text_features.values())):
            return self
        messages = [m if m.media is None else replace(m, media=m.media.to(device, non_blocking)) for m in self.messages]
        features = {k: v.to(device, non_blocking=non_blocking) for k, v in self.text_features.items()}
        return replace(self, messages=messages, text_features=features)

    def to_row(self) -> dict[str, Any]:
        """The released parquet row plus ``task``; tensors are not part of it."""
        inputs, images, videos = [], [], []
        for m in self.messages:
            item: dict[str, Any] = {"type": m.type, "has_loss": int(bool(m.has_loss))}
            if m.text is not None:
                item["text"] = m.text
            inputs.append(item)
            media = m.media or Media()
            if m.is_image:
                images.append(media.path)
            elif m.is_video:
                videos.append({"video_path": media.path, **media.options})
        return {"task": self.task, "inputs": json.dumps(inputs), "images": images, "videos": videos}

    @classmethod
    def from_row(cls, row: dict[str, Any], task: str | None = None, key: str = "") -> "Conversation":
        """Read a released row.

        Args:
            row: ``inputs`` (JSON string or list), ``images``, ``videos`` and, unless given apart, ``task`` or
                ``source_name`` (``<task>$<dataset>``).
            task: Task name that goes before the row's own.
            key: Sample key.

        Raises:
            DataError: The row is not in the released format.
        """
        name = task or row.get("task") or str(row.get("source_name") or "").split("$")[0]
        if not name:
            fix = "add a `task` to the row, or name its source `task$dataset`"
            raise DataError("the row names no task", where=key, fix=fix)
        try:
            inputs = row["inputs"]
            inputs = json.loads(inputs) if isinstance(inputs, str) else inputs
            images, videos = iter(row.get("images") or []), iter(row.get("videos") or [])
            messages = [cls._message(item, images, videos) for item in inputs]
        except DataError as error:
            raise DataError(error.what, where=key, why=error.why, fix=error.fix) from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"the row is not in the released format: {error!r}", where=key) from error
        except StopIteration as error:
            raise DataError("the row has more visual messages than media files", where=key) from error
        return cls(task=name.lower(), messages=messages, key=key)

    @staticmethod
    def _message(item: dict[str, Any], images: Iterator[Any], videos: Iterator[Any]) -> Message:
        has_loss = None if item.get("has_loss") is None else bool(item["has_loss"])
        if not isinstance(item.get("text"), str | None):
            raise TypeError(f"a text is {item['text']!r}")
        message = Message(item["type"], text=item.get("text"), has_loss=has_loss)
        if message.is_image:
            message.media = Media(path=next(images))
        elif message.is_video:
            entry = next(videos)
            entry = {"video_path": entry} if isinstance(entry, str) else dict(entry)
            message.media = Media(path=entry.pop("video_path"), options=entry)
        return message


def _is_prompt(message: Message) -> bool:
    return message.type == "cot_text" or (message.type == "text" and not message.has_loss)


@dataclass
class Batch:
    """Samples of one step.

    Attributes:
        samples: Conversations, of any tasks and sizes.
        cursor: In training, where the data order stands after this batch; elsewhere ``sample``, the number of its first
            sample. A few plain integers.
        bad: A row for each sample that could not be read and has been replaced: where it lies, and why. Plain JSON.
        place: Place of its first sample among those of its optimizer step; null where all batches have as many.
        weight: What the mean over its samples and those of all other ranks counts in the step, 1 on average.
    """

    samples: list[Conversation]
    cursor: dict[str, int] = field(default_factory=dict)
    bad: list[dict[str, Any]] = field(default_factory=list)
    place: int | None = None
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """A copy with every tensor on ``device``."""
        return replace(self, samples=[s.to(device, non_blocking) for s in self.samples])

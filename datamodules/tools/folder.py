"""A folder of shards as tools see it: what the index says, and parts of samples without the rest of them."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_128_hexdigest

from bernini.conversation import Conversation, Message
from bernini.errors import BadSample, DataError
from datamodules.index import INDEX, MAX_SIZES, Entry, Video, parse_index
from datamodules.records import ROW, TENSORS, parse_row
from datamodules.storage import StorageConfig, open_store

STRIDE, FRAMES = 8, 4  # pixels of a latent's edge, frames of all latents but a clip's first: the Wan VAE's
_IMAGES = ("png", "jpg")


class Feature(NamedTuple):
    """A stored tensor: dtype as safetensors writes it, such as ``BF16``, and shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Visual:
    """An image or a clip of a sample as it is stored.

    Attributes:
        message: Its message.
        pixels: Member with its file; nothing where only features are stored.
        features: Stored features, ``posterior.0`` or ``vit.0`` -> dtype and shape.
        width: Pixels: as stored, of which the latents were made, or which the vision tower took.
        height: Pixels, likewise.
        frames: Frames, likewise; 1 for an image.
        fps: Frames per second; 0 for an image.
    """

    message: Message
    pixels: str | None
    features: dict[str, Feature]
    width: int
    height: int
    frames: int
    fps: float


@dataclass(frozen=True)
class Record:
    """A sample without its pixels and features.

    Attributes:
        conversation: Task and messages; media are known by name alone.
        visuals: Images and clips, in order.
        texts: Text features, ``text.text`` -> dtype and shape.
    """

    conversation: Conversation
    visuals: list[Visual]
    texts: dict[str, Feature]


class Folder:
    """A folder of shards of any writer. Nothing of the shards is looked at until it is read.

    Args:
        folder: Local folder, or URL, with shards and their index.
        storage: How it is reached.

    Attributes:
        name: The folder.
        index: What its index says.
        entries: Every sample, in the order of shards and of samples in them.

    Raises:
        ConfigError: The place is never opened, or holds no index.
        DataError: The index is damaged.
    """

    def __init__(self, folder: str | Path, storage: StorageConfig | None = None) -> None:
        self.name, self.store = str(folder), open_store(folder, storage or StorageConfig())
        self.index = parse_index(self.store.text(INDEX), self.store.where(INDEX))
        self.entries = [entry for shard in self.index.shards for entry in shard.entries]
        self._sizes = {shard.name: shard.bytes for shard in self.index.shards}

    def record(self, entry: Entry) -> Record:
        """What the row of a sample, the heads of its features and the index say of it.

        Raises:
            BadSample: A member is damaged or missing.
            DataError: The row cannot be understood, or a remote shard is not the one that was indexed.
            ServiceError: The service does not give it.
        """
        where = f"{self.store.where(entry.shard)}:{entry.key}"
        row = parse_row({ROW: self._member(entry, ROW)} if ROW in entry.members else {}, where)
        features = self._features(entry) if TENSORS in entry.members else {}
        sizes = {name: self._size(entry, name) for name in entry.members if name.endswith(_IMAGES)}
        videos = {name: member.video for name, member in entry.members.items() if member.video}
        return record(row, entry.key, {**sizes, **videos}, features, where)

    def _member(self, entry: Entry, suffix: str) -> bytes:
        member = entry.members[suffix]
        data = self._read(entry, member.at, member.size)
        if xxh3_128_hexdigest(data) != member.xxh3:
            raise BadSample(
                "the bytes are not those that were indexed", shard=self.store.where(entry.shard), key=entry.key,
                member=suffix, offset=member.at, fix="`bernini data lint` names all that is damaged",
            )  # fmt: skip
        return data

    def _features(self, entry: Entry) -> dict[str, Feature]:
        """The head of the features, which are many times its size; its hash is not looked at."""
        member, where = entry.members[TENSORS], f"{self.store.where(entry.shard)}:{entry.key}.{TENSORS}"
        head = self._read(entry, member.at, min(8, member.size))
        size = min(int.from_bytes(head, "little"), member.size - len(head), MAX_SIZES["json"])
        return parse_features(head + self._read(entry, member.at + len(head), size), where)

    def _size(self, entry: Entry, suffix: str) -> Video:
        return image_size(self._member(entry, suffix), f"{self.store.where(entry.shard)}:{entry.key}.{suffix}")

    def _read(self, entry: Entry, at: int, size: int) -> bytes:
        return self.store.read(entry.shard, self._sizes[entry.shard], at, size)


def parse_features(data: bytes, where: str) -> dict[str, Feature]:
    """Dtypes and shapes of a safetensors file, of which the head is enough.

    Raises:
        DataError: The head is damaged.
    """
    try:
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return {
            name: Feature(str(row["dtype"]), tuple(map(int, row["shape"])))
            for name, row in head.items()
            if name != "__metadata__"
        }
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise DataError(f"damaged tensors: {error!r}", where=where, fix="write the shard again") from error


def image_size(data: bytes, where: str) -> Video:
    """Size of a PNG or JPEG, as a clip of one frame; only its head is decoded.

    Raises:
        DataError: It is neither.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            return Video(str(image.format).lower(), image.width, image.height, 1, 0.0)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError("the image cannot be read", where=where, fix="save it again as PNG") from error


def record(
    row: Mapping[str, Any], key: str, files: Mapping[str, Video], features: Mapping[str, Feature], where: str
) -> Record:
    """Put together what is known of a sample.

    Args:
        row: Its row, as `datamodules.records.encode` made it.
        key: Its key.
        files: What its images and clips show, by member.
        features: What its tensors are.
        where: Shard and key, for errors.

    Raises:
        DataError: The row cannot be understood, or names what is not there.
    """
    conversation = Conversation.from_row(dict(row), key=key)
    messages, rows = conversation.visual, row["visuals"]
    if len(messages) != len(rows):
        raise DataError(f"{len(messages)} visual messages, {len(rows)} visuals", where=f"{where}.{ROW}")
    try:
        visuals = [_visual(m, visual, files, features) for m, visual in zip(messages, rows, strict=True)]
        if any(min(visual.width, visual.height, visual.frames) < 1 for visual in visuals):
            raise ValueError("it has no pixels")
    except KeyError as error:
        raise DataError(f"{error.args[0]} of the sample is missing", where=where, why="its row names it") from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"a visual of the row cannot be read: {error!r}", where=f"{where}.{ROW}") from error
    texts = {name: feature for name, feature in features.items() if name.startswith("text.")}
    return Record(conversation, visuals, texts)


def _visual(
    message: Message, row: Mapping[str, Any], files: Mapping[str, Video], features: Mapping[str, Feature]
) -> Visual:
    held = {row[kind]: features[row[kind]] for kind in ("posterior", "vit") if kind in row}
    pixels, fps = row.get("pixels"), float(row["fps"] or 0)
    if pixels is not None:
        file = files[pixels]
        return Visual(message, pixels, held, file.width, file.height, file.frames, file.fps)
    if "posterior" in row:
        _, t, h, w = held[row["posterior"]].shape
        return Visual(message, None, held, w * STRIDE, h * STRIDE, 1 + (t - 1) * FRAMES, fps)
    (t, h, w), vision = row["seen"]["grid"], row["seen"]["vision"]
    frames, patch = (t * vision["temporal_patch"], vision["patch"]) if message.is_video else (1, vision["patch"])
    return Visual(message, None, held, w * patch, h * patch, frames, vision["fps"] if message.is_video else 0.0)


def aligned(head: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> Iterator[str]:
    """Lines of a table for the terminal: the first ``left`` columns to the left, all others to the right."""
    rows = [head, *body]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        cells = zip(row, widths, range(len(row)), strict=True)
        yield "  ".join(c.ljust(width) if column < left else c.rjust(width) for c, width, column in cells)

"""`bernini data lint`: everything is read once, and all that is wrong is named."""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, chain
from multiprocessing import get_context

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from xxhash import xxh3_128_hexdigest

from bernini.decoding import Limits
from bernini.errors import BerniniError, ConfigError, DataError
from bernini.media import read_image
from bernini.suggest import closest
from datamodules.decoder import decoder
from datamodules.index import INDEX, Entry, Member, Shard, Video
from datamodules.records import ROW, TENSORS, parse_row
from datamodules.storage import Local, StorageConfig, Store, open_store
from datamodules.tools.folder import Feature, Folder, Record, Visual, image_size, parse_features, record

RULES = {
    "shard": "a shard is missing, not in the index, of another size, or changed between its members",
    "key": "a key comes twice",
    "hash": "the bytes of a member are not those that were indexed",
    "cut": "a member is not there in full: the shard ends before",
    "decode": "a member cannot be decoded",
    "index": "a clip or a task is not what the index says",
    "row": "the sample has no row of `bernini prepare`, or one that does not fit its members",
    "task": "the task is unknown, or takes other images and clips",
    "prompt": "the prompt is empty",
    "features": "features have values that are not finite, or a shape that cannot be",
    "pair": "the source clip and the target differ in length or rate",
    "frames": "a clip has not 4k + 1 frames: its last one is repeated in training",
}
BLOCK = 1 << 24  # bytes


class Findings(BerniniError):
    """Something is wrong with the data."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        shard: File name of the shard.
        key: Key of the sample; empty where it is about the whole shard.
        member: Suffix of the member; empty where it is about the whole sample.
        rule: One of `RULES`.
        what: What is wrong.
    """

    shard: str
    key: str
    member: str
    rule: str
    what: str

    def __str__(self) -> str:
        sample = f":{self.key}" if self.key else ""
        return f"{self.shard}{sample}{'.' if self.member else ''}{self.member}: {self.rule}: {self.what}"

    def row(self) -> dict[str, str]:
        """Plain JSON."""
        return asdict(self)


def lint(
    folder: Folder,
    storage: StorageConfig | None = None,
    workers: int = 0,
    ignore: Collection[str] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Finding]:
    """Read every byte of a folder once; all that is wrong, in the order of the shards.

    Args:
        folder: The folder.
        storage: How it is reached, for the workers.
        workers: Processes that read, a shard at a time each; 0 reads in this one.
        ignore: Rules to leave out.
        progress: Called with the number of samples read.

    Raises:
        ConfigError: A rule is unknown, or ``workers`` negative.
        ServiceError: A service does not give a shard.
    """
    for name in ignore:
        if name not in RULES:
            raise ConfigError(
                f"unknown rule {name!r}", why=f"the rules are {', '.join(RULES)}", fix=closest(name, RULES)
            )
    if workers < 0:
        raise ConfigError(f"workers is {workers}", fix="give 0 or more")
    one = partial(_lint_shard, folder.name, storage or StorageConfig())
    with ExitStack() as stack:
        every: Iterator[list[Finding]] = map(one, folder.index.shards)
        if workers:
            pool = ProcessPoolExecutor(workers, get_context("forkserver"))
            every = stack.enter_context(pool).map(one, folder.index.shards)
        done = accumulate((len(shard.entries) for shard in folder.index.shards), initial=0)
        for count, found in zip(done, chain([_of_index(folder)], every), strict=True):
            yield from (finding for finding in found if finding.rule not in ignore)
            progress(count)


def _of_index(folder: Folder) -> list[Finding]:
    """Shards that are in the folder but not in the index, and keys that come twice."""
    shards, first = {shard.name for shard in folder.index.shards}, dict[str, str]()
    found = []
    if isinstance(folder.store, Local):
        away = sorted(set(folder.store.names()) - shards)
        found = [Finding(name, "", "", "shard", f"it is not in {INDEX}") for name in away]
    for entry in folder.entries:
        if (where := first.setdefault(entry.key, entry.shard)) != entry.shard:
            found.append(Finding(entry.shard, entry.key, "", "key", f"{where} has a sample with the same key"))
    return found


def _lint_shard(folder: str, storage: StorageConfig, shard: Shard) -> list[Finding]:
    """All that is wrong with one shard."""
    found: list[Finding] = []
    store, digest, done = open_store(folder, storage), hashlib.sha256(), 0

    def between(end: int) -> None:
        for at in range(done, end, BLOCK):
            digest.update(store.read(shard.name, shard.bytes, at, min(BLOCK, end - at)))

    try:
        if fault := _size_fault(store, shard):
            found.append(Finding(shard.name, "", "", "shard", fault))
        for entry in sorted(shard.entries, key=lambda entry: entry.at):
            between(entry.at)
            span = _read(store, shard, entry, 0 if isinstance(store, Local) else storage.retries)
            digest.update(span[max(0, done - entry.at) :])
            done = max(done, entry.at + entry.span)
            found += _lint_sample(entry, span)
        between(shard.bytes)
    except DataError as error:  # gone, or replaced while it was being read
        return [*found, Finding(shard.name, "", "", "shard", error.what)]
    if digest.hexdigest() != shard.sha256 and not any(f.rule in ("shard", "hash", "cut") for f in found):
        what = "its sha256 is not that of the index, although all members are right: headers or padding have changed"
        found.append(Finding(shard.name, "", "", "shard", what))
    return found


def _size_fault(store: Store, shard: Shard) -> str | None:
    """Why a local shard is not as long as it should be; remote ones are looked at when they are read."""
    if not isinstance(store, Local):
        return None
    with store.open(shard.name) as file:
        size = file.seek(0, io.SEEK_END)
    return f"it has {size} bytes, the index says {shard.bytes}" if size != shard.bytes else None


def _read(store: Store, shard: Shard, entry: Entry, rereads: int) -> bytes:
    """Bytes of a sample; what came wrong from elsewhere is read again."""
    span = store.read(shard.name, shard.bytes, entry.at, entry.span)
    if rereads and any(xxh3_128_hexdigest(_cut(entry, m, span)) != m.xxh3 for m in entry.members.values()):
        store.check(shard.name, shard.bytes)
        return _read(store, shard, entry, rereads - 1)
    return span


def _cut(entry: Entry, member: Member, span: bytes) -> bytes:
    return span[member.at - entry.at :][: member.size]


def _lint_sample(entry: Entry, span: bytes) -> list[Finding]:
    """All that is wrong with one sample, whose bytes these are."""
    report = partial(Finding, entry.shard, entry.key)
    found: list[Finding] = []
    members: dict[str, bytes] = {}
    for suffix, member in entry.members.items():
        data = _cut(entry, member, span)
        if len(data) < member.size:
            found.append(report(suffix, "cut", f"{len(data)} of {member.size} bytes are there"))
        elif xxh3_128_hexdigest(data) != member.xxh3:
            found.append(report(suffix, "hash", "the bytes are not those that were indexed"))
        else:
            members[suffix] = data
    files: dict[str, Video] = {}
    features: dict[str, Feature] = {}
    for suffix, data in members.items():
        try:
            if suffix.endswith(("png", "jpg")):
                read_image(data, limits=Limits())
                files[suffix] = image_size(data, "")
            elif suffix.endswith("mp4"):
                files[suffix], wrong = _lint_clip(data, entry.members[suffix])
                found += [report(suffix, rule, what) for rule, what in wrong]
            elif suffix == TENSORS:
                features = parse_features(data, "")
                found += [report(suffix, "features", what) for what in _not_finite(data)]
        except DataError as error:
            found.append(report(suffix, "decode", error.what))
    if not any(finding.rule in ("cut", "hash", "decode") for finding in found):
        found += [report(*wrong) for wrong in _lint_row(entry, members, files, features)]
    return found


def _lint_clip(data: bytes, member: Member) -> tuple[Video, list[tuple[str, str]]]:
    """What a clip shows, and rule and text of what is wrong with it; all frames are decoded.

    Raises:
        DataError: It cannot be decoded.
    """
    probed, _ = decoder(Limits())(data, lambda found: range(found.frames), "")
    frames = probed.frames
    video = Video(probed.codec, probed.width, probed.height, frames, probed.fps)
    wrong = []
    if member.video != video:
        wrong.append(("index", f"it is {_words(video)}, the index says {_words(member.video)}"))
    if more := -(frames - 1) % 4:
        wrong.append(("frames", f"{frames} frames are not 4k + 1, the last one is repeated {more} times"))
    return video, wrong


def _words(video: Video | None) -> str:
    if video is None:
        return "nothing"
    return f"{video.codec} {video.width}x{video.height}, {video.frames} frames at {video.fps:g} fps"


def _not_finite(data: bytes) -> Iterator[str]:
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError) as error:
        raise DataError(f"damaged tensors: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.sum(dtype=torch.float32).isfinite():
            continue
        if count := int((~tensor.isfinite()).sum()):  # none where the sum alone is too large
            yield f"{name} has {count} values that are not finite"


def _lint_row(
    entry: Entry, members: Mapping[str, bytes], files: Mapping[str, Video], features: Mapping[str, Feature]
) -> Iterator[tuple[str, str, str]]:
    """Member, rule and text of what is wrong with a sample's row, and with what it says of the members."""
    try:
        row = parse_row(members, "")
        known = record(row, entry.key, files, features, "")
    except DataError as error:
        yield ROW, "row", error.what
        return
    sample = known.conversation
    if sample.task != entry.task.lower():
        yield ROW, "index", f"its task is {sample.task}, the index says {entry.task or 'nothing'}"
    if not sample.prompt.strip():
        yield ROW, "prompt", "the prompt is empty"
    yield from _lint_features(known)
    try:
        sample.check(targets=False)
        for message in sample.targets:
            if message.is_image != (sample.spec.target == "image"):
                made = "an image" if message.is_image else "a clip"
                yield ROW, "task", f"task {sample.task} makes no target that is {made}"
    except (ConfigError, DataError) as error:
        yield ROW, "task", error.what
        return
    if sample.spec.videos == (1, 1):
        yield from _lint_pair([visual for visual in known.visuals if visual.message.is_video])


def _lint_features(known: Record) -> Iterator[tuple[str, str, str]]:
    for visual in known.visuals:
        for name, (_, shape) in visual.features.items():
            if (name.startswith("vit.") and len(shape) != 2) or (name.startswith("posterior.") and shape[0] % 2):
                yield TENSORS, "features", f"{name} is {list(shape)}"


def _lint_pair(clips: list[Visual]) -> Iterator[tuple[str, str, str]]:
    source = next(clip for clip in clips if not clip.message.is_target)
    for target in (clip for clip in clips if clip.message.is_target):
        if source.frames != target.frames:
            yield target.pixels or TENSORS, "pair", f"{target.frames} frames, its source has {source.frames}"
        if abs(source.fps - target.fps) > 0.01 * source.fps:
            yield target.pixels or TENSORS, "pair", f"{target.fps:g} fps, its source has {source.fps:g}"


def summary(found: list[Finding], folder: Folder) -> Findings:
    """The error that ends a run with findings."""
    rules = ", ".join(f"{rule} {count}" for rule, count in Counter(finding.rule for finding in found).most_common())
    return Findings(
        f"{len(found)} finding(s) in {len(folder.entries)} samples: {rules}",
        where=folder.name,
        fix="mend the samples or leave them out; `--ignore [RULE]` leaves a rule out",
    )

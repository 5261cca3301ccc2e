"""What `bernini prepare` reads: a folder of clips by naming convention, or a JSON-lines list."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bernini.conversation import Conversation, Media, Message
from bernini.errors import ConfigError, DataError
from bernini.suggest import closest
from bernini.tasks import get_task

VIDEOS = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi"})
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
FIELDS = ("key", "task", "prompt", "videos", "images", "target")
CLIP_OPTIONS = {"start": (int, float), "duration": (int, float), "crop_method": (str,)}
_ROLE = re.compile(r"(?P<name>.+)\.(?P<role>src|tgt|ref)(?P<number>\d*)")


@dataclass(frozen=True)
class Source:
    """One sample that has been found but not read.

    Attributes:
        key: Key it gets.
        where: File, or list and line, for errors.
        root: Folder that its paths are relative to.
        parts: Line of the list, or files of the folder by role.
    """

    key: str
    where: str
    root: Path
    parts: str | dict[str, Path]

    @property
    def identity(self) -> str:
        """Text that changes when another sample takes its place."""
        parts = self.parts if isinstance(self.parts, str) else sorted(path.name for path in self.parts.values())
        return f"{self.key} {self.root.resolve()} {parts}"

    def conversation(self, task: str | None = None, targets: bool = True) -> Conversation:
        """The sample, its media known by path alone.

        Args:
            task: Task that goes before the row's own.
            targets: Whether a target is required; if not, a given one is left out.

        Raises:
            ConfigError: The task is unknown.
            DataError: The row cannot be understood, or does not suit its task.
        """
        try:
            row = _parse(self.parts) if isinstance(self.parts, str) else _row(self.parts)
            released = "inputs" in row
            found = Conversation.from_row(row, task, self.key) if released else _from_fields(row, task, self.key)
        except (DataError, ConfigError) as error:
            raise type(error)(error.what, where=self.where, why=error.why, fix=error.fix) from error
        return finished(found, self.root, self.where, targets)


def finished(sample: Conversation, root: Path, where: str, targets: bool) -> Conversation:
    """Check a sample that was found, and make its paths those of files.

    Args:
        sample: The sample; it is changed.
        root: Folder that its paths are relative to.
        where: What it was found in, for errors.
        targets: Whether a target is required; if not, a given one is left out.

    Raises:
        ConfigError: The task is unknown.
        DataError: The sample does not suit its task, or media have neither file nor features.
    """
    try:
        if not targets:
            sample.messages = [m for m in sample.messages if not m.is_target]
        sample.check(targets)
    except (DataError, ConfigError) as error:
        raise type(error)(error.what, where=where, why=error.why, fix=error.fix) from error
    sample.task = sample.spec.name
    for media in sample.media():
        if media.prepared:
            continue
        if not isinstance(media.path, str):
            raise DataError(f"a path is {media.path!r}", where=where, fix="give each visual a file")
        for name, kinds in CLIP_OPTIONS.items():
            if not isinstance(media.options.get(name), (*kinds, type(None))):
                raise DataError(f"{name} is {media.options[name]!r}", where=where, fix="see the released rows")
        media.path = str(root / media.path)
    return sample


def find_sources(path: str | Path, targets: bool = True) -> list[Source]:
    """Samples of a folder or of a list, in a fixed order.

    In a folder, files belong to the sample that their name begins with: ``NAME.src.mp4``, ``NAME.src2.mp4``,
    ``NAME.src.png`` sources, ``NAME.ref0.png`` references, ``NAME.tgt.mp4`` or ``NAME.mp4`` the target (or, without
    targets, the source), ``NAME.txt`` the prompt, ``NAME.json`` further fields such as ``task``. Without a task the
    files say it: two clips are ads2v, a clip and images rv2v, a clip v2v, an image i2i or i2v, references r2i or r2v, a
    prompt t2i or t2v.

    In a list, a line is a released row, or has the fields ``task``, ``prompt``, ``videos``, ``images``, ``target`` and
    ``key``; paths are relative to the list, and a clip may be a mapping with ``video_path``, ``start``, ``duration``
    (seconds) and ``crop_method``.

    Args:
        path: Folder, or JSON-lines file.
        targets: Whether a plain file is a target, rather than a source.

    Raises:
        ConfigError: There is no such path.
        DataError: There is no sample.
    """
    path = Path(path)
    if path.is_dir():
        found = _in_folder(path, targets)
    elif path.is_file():
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        found = [
            Source(_key(line) or f"{n:08d}", f"{path}, line {n}", path.parent, line)
            for n, line in lines
            if line.strip()
        ]
    else:
        raise ConfigError("the input does not exist", where=str(path), fix="name a folder or a JSON-lines file")
    if not found:
        raise DataError("no sample found", where=str(path), why="files are named NAME.src.mp4, NAME.tgt.mp4, NAME.txt")
    return found


def _key(text: str) -> str | None:
    """The key that a line names, if it is one that can be read."""
    try:
        return str(_parse(text)["key"])
    except (DataError, KeyError):
        return None


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"not JSON: {error}", fix="write one JSON object a line") from error
    if not isinstance(row, dict):
        raise DataError("not a JSON object", fix="write one JSON object a line")
    return row


def _from_fields(row: dict[str, Any], task: str | None, key: str) -> Conversation:
    if unknown := [name for name in row if name not in FIELDS]:
        fix = closest(unknown[0], FIELDS) or "remove it"
        raise DataError(f"unknown field {unknown[0]!r}", why=f"the fields are {', '.join(FIELDS)}", fix=fix)
    name = task or row.get("task")
    if not name:
        raise DataError("the sample has no task", fix="add a `task`, or give `--task` for all")
    if not isinstance(row.get("prompt"), str):
        raise DataError("the sample has no prompt", fix="add a `prompt`, or a NAME.txt beside the clips")
    messages = []
    for video in row.get("videos") or []:
        options = dict(video) if isinstance(video, dict) else {"video_path": video}
        messages.append(Message("video", media=Media(path=options.pop("video_path", None), options=options)))
    messages += [Message("image", media=Media(path=image)) for image in row.get("images") or []]
    messages.append(Message("text", text=row["prompt"]))
    if row.get("target"):
        kind = get_task(name).target
        target = {"video_path": row["target"]} if isinstance(row["target"], str) else dict(row["target"])
        media = Media(path=target.pop("video_path", None), options=target)
        messages.append(Message("video_gen" if kind == "video" else "image_gen", media=media))
    return Conversation(name, messages, key=key)


def _in_folder(folder: Path, targets: bool) -> list[Source]:
    groups: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith(".") or suffix not in VIDEOS | IMAGES | {".txt", ".json"}:
            continue
        match = _ROLE.fullmatch(path.stem)
        name = match["name"] if match else path.stem
        role = (
            f"{match['role']}{int(match['number'] or 0):04d}"
            if match
            else suffix
            if suffix in (".txt", ".json")
            else ""
        )
        role = role or ("tgt0000" if targets else "src0000")
        if role in groups.setdefault(name, {}):
            raise DataError(f"{path.name} and {groups[name][role].name} have the same part", where=str(folder))
        groups[name][role] = path
    sources: list[Source] = []
    keys: set[str] = set()
    for name, files in groups.items():
        key = base = re.sub(r"[^a-z0-9_-]+", "-", name.lower())[:56]
        while key in keys:
            key = f"{base}-{len(keys)}"
        if ".json" in files:
            key = _key(files[".json"].read_text(encoding="utf-8")) or key
        keys.add(key)
        sources.append(Source(key, str(folder / name), folder, files))
    return sources


def _row(files: dict[str, Path]) -> dict[str, Any]:
    """Fields of the files of one sample, role -> file."""
    parts = {role: [files[r] for r in sorted(files) if r.startswith(role)] for role in ("src", "ref", "tgt")}
    videos = [path.name for path in parts["src"] if path.suffix.lower() in VIDEOS]
    frames = [path.name for path in parts["src"] if path.suffix.lower() in IMAGES]
    references = [path.name for path in parts["ref"]]
    row: dict[str, Any] = {"videos": videos, "images": frames + references}
    kind = None
    if parts["tgt"]:
        row["target"] = parts["tgt"][0].name
        kind = "v" if parts["tgt"][0].suffix.lower() in VIDEOS else "i"
    if task := _guess(len(videos), len(frames), len(references), kind):
        row["task"] = task
    if ".txt" in files:
        row["prompt"] = files[".txt"].read_text(encoding="utf-8").strip()
    if ".json" in files:
        row |= _parse(files[".json"].read_text(encoding="utf-8"))
    return row


def _guess(videos: int, frames: int, references: int, target: str | None) -> str | None:
    """Task of a sample by what it is made of; without a target or a clip it may be one or the other."""
    if videos:
        return "ads2v" if videos > 1 else "rv2v" if frames + references else "v2v"
    if target is None:
        return None
    return f"{'i' if frames else 'r' if references else 't'}2{target}"

"""EditVerseBench: instructed edits of clips, with and without references."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from benchmarks.quality.interface import Item
from benchmarks.quality.official.base import Clips, Sourced, facts
from benchmarks.quality.official.drafts import Draft
from benchmarks.quality.official.needs import CLIP_H14, CLIP_L14, DINOV2_B, PICKSCORE, VICLIP, Judge, Needs
from benchmarks.quality.official.reading import Row, Schema, checked, read_json, refuse
from benchmarks.quality.official.source import Source
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import editverse
from benchmarks.quality.totals.records import Range

FILE = "test.json"
TAG = re.compile(r"<((?:video|image)\d+)>")
SCHEMA = Schema(
    required={
        "<text>": str,
        "<video1>": str,
        "direction": str,
        "target_prompt": str,
        "source_prompt": str,
        "type": str,
    },
    optional={
        f"<{kind}{number}>{suffix}": str
        for kind in ("video", "image")
        for number in (1, 2, 3)
        for suffix in ("", " link")
    },
)
DIRECTIONS = ("horizontal", "vertical")
TASKS = {(1, False): "v2v", (1, True): "rv2v", (2, False): "ads2v", (2, True): "ads2v"}
"""Task by the number of clips, and whether there are images; one task alone takes two clips."""


@dataclass(frozen=True)
class EditVerse(Clips, Sourced):
    """EditVerseBench, one clip an entry.

    The text names sources by tags as ``<video1>``. A tag that opens the text is left out of the prompt; others become
    "the video" and "the image", with their number from the second on.

    ``extra`` has ``text``, ``source_prompt``, ``target_prompt`` and ``direction``.

    Attributes:
        root: Folder with ``test.json``, ``videos/``, ``images/`` and the others.
    """

    name: ClassVar[str] = "editverse"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = "EditVerseBench; Adobe Research License, not for commercial use; clips come from Pixabay."
    source: ClassVar[Source] = Source(
        home="https://github.com/adobe-research/EditVerse",
        download="hf download --repo-type dataset sooyek/EditVerseBench, and its clips by download_source_video.py",
        licence="Adobe Research License, not for commercial use; clips under Pixabay's",
        restricted=True,
    )
    metrics: ClassVar[dict[str, str]] = {
        "editing_quality": "edit and background as a judge sees them, 0 to 9",
        "pick": "frames are as people like them for the text",
        "frame_text": "frames show what the target prompt says",
        "video_text": "the clip shows what the target prompt says",
        "clip_tc": "neighbouring frames are alike to CLIP",
        "dino_tc": "neighbouring frames are alike to DINOv2",
    }
    needs: ClassVar[Needs] = {
        "editing_quality": (Judge("gpt-4o-2024-11-20", answers=4),),
        "pick": (PICKSCORE, CLIP_H14),
        "frame_text": (CLIP_L14,),
        "video_text": (VICLIP,),
        "clip_tc": (CLIP_L14,),
        "dino_tc": (DINOV2_B,),
    }

    ranges: ClassVar[Mapping[str, Range]] = editverse.RANGES

    root: str = "data/EditVerseBench"

    def read(self) -> Iterator[Draft]:
        """One item an entry, in the order of the file."""
        path = self.folder / FILE
        content: dict[str, Any] = read_json(path, self.source, dict)
        for key, row in zip(content, checked(content, SCHEMA, path, self.source), strict=True):
            if row["direction"] not in DIRECTIONS:
                why = f"there are {', '.join(DIRECTIONS)}"
                raise refuse(f"unknown direction {row['direction']!r}", path, key, "direction", why, self.source)
            videos, images = (_files(row, kind) for kind in ("video", "image"))
            if unknown := sorted({tag for tag in TAG.findall(row["<text>"]) if f"<{tag}>" not in row}):
                why = "the entry has no such source"
                raise refuse(f"the text names <{unknown[0]}>", path, key, "<text>", why, self.source)
            task = TASKS.get((len(videos), bool(images)))
            if task is None:
                raise refuse(
                    f"{len(videos)} clips", path, key, f"<video{len(videos)}>", "no task takes them", self.source
                )
            yield Draft(
                id=key,
                task=task,
                prompt=spoken(row["<text>"]),
                output=f"{key}/generate.mp4",
                metrics=tuple(self.metrics),
                category=row["type"],
                videos=videos,
                images=images,
                extra={
                    "text": row["<text>"],
                    **{name: row[name] for name in ("source_prompt", "target_prompt", "direction")},
                },
            )

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """The six means."""
        return [Tally("EditVerseBench", facts(items), editverse.totals, "editverse", apart=True)]


def spoken(text: str) -> str:
    """An instruction without tags."""

    def name(tag: re.Match[str]) -> str:
        kind, number = tag[1][:5], int(tag[1][5:])
        return f"the {kind}" if number == 1 else f"the {kind} {number}"

    return " ".join(TAG.sub(name, re.sub(rf"^\s*(?:{TAG.pattern}\s*)+", "", text)).split())


def _files(row: Row, kind: str) -> tuple[str, ...]:
    return tuple(row[f"<{kind}{number}>"] for number in (1, 2, 3) if f"<{kind}{number}>" in row)

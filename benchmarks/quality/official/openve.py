"""OpenVE-Bench: instructed edits of clips, scored by a judge."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import ClassVar

from benchmarks.quality.interface import Item
from benchmarks.quality.official.base import Clips, Sourced, facts
from benchmarks.quality.official.drafts import Draft, word
from benchmarks.quality.official.needs import Judge, Needs
from benchmarks.quality.official.reading import Schema, check_count, checked, read_csv, refuse
from benchmarks.quality.official.settings import check_names
from benchmarks.quality.official.source import Source
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import openve
from benchmarks.quality.totals.catalogue import RULES
from benchmarks.quality.totals.records import Range

FILE, ENTRIES = "benchmark_videos.csv", 431
TYPES = (
    "global_style",
    "background_change",
    "local_change",
    "local_remove",
    "local_add",
    "subtitle_edit",
    "creative_edit",
    "camera_edit",
)
FIVE, SIX = TYPES[:5], TYPES[:6]
"""The sets over which papers also take their "overall": figures of different sets do not compare."""
SCHEMA = Schema(required={"edited_type": str, "prompt": str, "original_video": str}, optional={}, closed=False)


@dataclass(frozen=True)
class OpenVE(Clips, Sourced):
    """OpenVE-Bench, 431 pairs of clip and instruction.

    Attributes:
        root: Folder with ``benchmark_videos.csv`` and ``videos/``.
        types: Kinds of edit, over which "overall" is the mean: all eight as in Bernini's paper, five or six in others.
    """

    name: ClassVar[str] = "openve"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = (
        "OpenVE-Bench, 431 edits of eight types; CC-BY-NC-4.0. Figures compare with those of equal types and judge."
    )
    source: ClassVar[Source] = Source(
        home="https://huggingface.co/datasets/Lewandofski/OpenVE-Bench",
        download="hf download --repo-type dataset Lewandofski/OpenVE-Bench",
        licence="CC-BY-NC-4.0, not for commercial use",
        restricted=True,
    )
    metrics: ClassVar[dict[str, str]] = {
        "instruction_compliance": "the edit is what was asked for, 1 to 5",
        "consistency": "what was not asked for and details stay, 1 to 5",
        "visual_quality": "the clip looks good and is stable, 1 to 5",
    }
    ranges: ClassVar[dict[str, Range]] = dict.fromkeys(metrics, Range(1, 5))
    needs: ClassVar[Needs] = dict.fromkeys(metrics, (Judge("gemini-2.5-pro"),))

    root: str = "data/OpenVE-Bench"
    types: tuple[str, ...] = TYPES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("types", self.types, TYPES)

    def read(self) -> Iterator[Draft]:
        """The edits of the chosen types, in the order of the file."""
        path = self.folder / FILE
        rows = list(checked(read_csv(path, self.source), SCHEMA, path, self.source))
        check_count(len(rows), ENTRIES, "entries", path, self.source)
        for number, row in enumerate(rows):
            kind, video = row["edited_type"].strip(), PurePosixPath(row["original_video"].strip())
            if kind not in TYPES:
                why = f"there are {', '.join(TYPES)}"
                raise refuse(f"unknown type {kind!r}", path, number, "edited_type", why, self.source)
            if video.suffix != ".mp4":
                raise refuse(
                    f"{video} is no MP4", path, number, "original_video", "outputs are named by it", self.source
                )
            if kind in self.types:
                yield Draft(
                    id=word(video.stem),
                    task="v2v",
                    prompt=row["prompt"].strip(),
                    output=f"{video.stem}_edited.mp4",
                    metrics=tuple(self.metrics),
                    category=kind,
                    videos=(f"videos/{video.name}",),
                )

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """Overall score and types; printed tables are of five, six or eight types."""
        named = f"openve {len(self.types)} types"
        printed = named in RULES and openve.overall(self.types) == f"overall ({len(self.types)} types)"
        compute = partial(openve.totals, types=self.types)
        return [Tally("OpenVE-Bench", facts(items), compute, named if printed else "")]

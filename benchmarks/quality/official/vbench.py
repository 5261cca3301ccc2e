"""VBench 1.0: 16 dimensions of text-to-video."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from benchmarks.quality.interface import Item
from benchmarks.quality.official.base import Clips, Made, facts
from benchmarks.quality.official.drafts import Draft
from benchmarks.quality.official.needs import (
    AMT_S,
    CLIP_B32,
    CLIP_L14,
    DINO_B16,
    LAION_LINEAR,
    MUSIQ_SPAQ,
    RAFT,
    VICLIP,
    Needs,
    Weights,
)
from benchmarks.quality.official.reading import Row, Schema, check_count, check_counts, checked, find, read_json
from benchmarks.quality.official.settings import check_names
from benchmarks.quality.official.source import Source
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import vbench
from benchmarks.quality.totals.records import Range, in_percent

FILE = "VBench_full_info.json"
ENTRIES = 946
SAMPLES, FLICKERING_SAMPLES = 5, 25
PER_DIMENSION = {
    "subject_consistency": 72,
    "background_consistency": 86,
    "temporal_flickering": 75,
    "motion_smoothness": 72,
    "dynamic_degree": 72,
    "aesthetic_quality": 93,
    "imaging_quality": 93,
    "object_class": 79,
    "multiple_objects": 82,
    "human_action": 100,
    "color": 85,
    "spatial_relationship": 84,
    "scene": 86,
    "temporal_style": 100,
    "appearance_style": 90,
    "overall_consistency": 93,
}
"""Prompts of each dimension, in the order of the published tables."""
SCHEMA = Schema(required={"prompt_en": str, "dimension": list}, optional={"auxiliary_info": dict})
GRIT = Weights("grit_b_densecap_objectdet.pth", origin="github.com/JialianW/GRiT")
TAG2TEXT = Weights("tag2text_swin_14m.pth", origin="hub, spaces/xinyu1205/recognize-anything")
UMT_L16 = Weights("l16_ptk710_ftk710_ftk400_f16_res224.pth", origin="hub, OpenGVLab/VBench_Used_Models")


@dataclass(frozen=True)
class VBench(Clips, Made):
    """VBench 1.0, five clips of each prompt.

    Prompts of ``temporal_flickering`` get 25 clips, of which the official filter keeps those that stand still, see
    `benchmarks.quality.metrics.motion.stands_still`. Two
    prompts come twice, with other dimensions; their clips have the same file names, so they are made once and scored
    in the dimensions of both.

    Attributes:
        root: Folder with ``VBench_full_info.json``, or with ``vbench/`` as in the wheel; empty takes the installed
            package ``vbench``, which is not imported.
        dimensions: Dimensions; a part gives no total.

    ``extra`` has ``entries``, the number of entries that an item stands for, and their ``auxiliary_info``.
    """

    name: ClassVar[str] = "vbench"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = "VBench 1.0, 946 prompts in 16 dimensions; Apache-2.0."
    source: ClassVar[Source] = Source(
        home="https://github.com/Vchitect/VBench",
        download="the wheel: pip download --no-deps vbench==0.1.5, and unpack it",
        licence="Apache-2.0",
    )
    metrics: ClassVar[dict[str, str]] = {
        "subject_consistency": "the subject looks the same in all frames",
        "background_consistency": "the background looks the same in all frames",
        "temporal_flickering": "what stands still does not flicker",
        "motion_smoothness": "frames lie on smooth motion between their neighbours",
        "dynamic_degree": "something moves",
        "aesthetic_quality": "frames look good",
        "imaging_quality": "frames have no noise, blur or overexposure",
        "object_class": "the object is there",
        "multiple_objects": "both objects are there",
        "human_action": "the action is recognised",
        "color": "the object has its colour",
        "spatial_relationship": "objects lie beside or above each other as told",
        "scene": "the scene is recognised",
        "temporal_style": "camera and speed are as told",
        "appearance_style": "the style is as told",
        "overall_consistency": "the clip shows what the text says",
    }
    ranges: ClassVar[dict[str, Range]] = {name: vbench.RANGES[name] for name in metrics}
    needs: ClassVar[Needs] = {
        "subject_consistency": (DINO_B16,),
        "background_consistency": (CLIP_B32,),
        "temporal_flickering": (RAFT,),
        "motion_smoothness": (AMT_S,),
        "dynamic_degree": (RAFT,),
        "aesthetic_quality": (CLIP_L14, LAION_LINEAR),
        "imaging_quality": (MUSIQ_SPAQ,),
        **dict.fromkeys(("object_class", "multiple_objects", "color", "spatial_relationship"), (GRIT,)),
        "human_action": (UMT_L16,),
        "scene": (TAG2TEXT,),
        "temporal_style": (VICLIP,),
        "appearance_style": (CLIP_B32,),
        "overall_consistency": (VICLIP,),
    }

    dimensions: tuple[str, ...] = tuple(PER_DIMENSION)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("dimensions", self.dimensions, tuple(self.metrics))

    def read(self) -> Iterator[Draft]:
        """Clips of each prompt, in the order of the file."""
        for number, rows in enumerate(grouped(self._entries())):
            prompt = rows[0]["prompt_en"]
            dimensions = [name for row in rows for name in row["dimension"]]
            metrics = tuple(name for name in self.dimensions if name in dimensions)
            if not metrics:
                continue
            about = {key: value for row in rows for key, value in row.get("auxiliary_info", {}).items()}
            for sample in range(FLICKERING_SAMPLES if "temporal_flickering" in metrics else SAMPLES):
                yield Draft(
                    id=f"{number:04d}-{sample}",
                    task="t2v",
                    prompt=prompt,
                    output=f"{prompt}-{sample}.mp4",
                    metrics=metrics,
                    category=dimensions[0],
                    repeat=sample,
                    extra={"entries": len(rows), "auxiliary_info": about},
                )

    def prompts(self, drafts: Sequence[Draft]) -> list[str]:
        """The prompt of each entry, as the published lists of rewritten ones have them: two come twice."""
        return [row["prompt_en"] for row in self._entries()]

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """Total, its parts and the dimensions, in per cent."""
        return [Tally("VBench 1.0", facts(items), in_percent(vbench.totals), "vbench")]

    def _entries(self) -> list[Row]:
        path = find(self.source, *self._places())
        rows = list(checked(read_json(path, self.source, list), SCHEMA, path, self.source))
        check_count(len(rows), ENTRIES, "entries", path, self.source)
        check_counts([name for row in rows for name in row["dimension"]], PER_DIMENSION, "dimension", path, self.source)
        return rows

    def _places(self) -> list[Path]:
        if self.root:
            return [self.folder / FILE, self.folder / "vbench" / FILE]
        installed = find_spec("vbench")
        folders = (installed.submodule_search_locations if installed else None) or ["vbench"]
        return [Path(folder) / FILE for folder in folders]


def grouped(rows: Sequence[Row], *by: str) -> list[list[Row]]:
    """Entries of one prompt together, in order: they share their clips.

    Args:
        rows: Entries with ``prompt_en``.
        by: Further fields that have to be equal.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[name]) for name in ("prompt_en", *by)), []).append(row)
    return list(groups.values())

"""VBench-I2V: image-to-video."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from benchmarks.quality.interface import Item
from benchmarks.quality.official.base import Clips, Sourced, facts
from benchmarks.quality.official.drafts import Draft
from benchmarks.quality.official.needs import (
    AMT_S,
    CLIP_B32,
    CLIP_L14,
    COTRACKER2,
    DINO_B16,
    LAION_LINEAR,
    MUSIQ_SPAQ,
    RAFT,
    Needs,
    Weights,
)
from benchmarks.quality.official.reading import Row, Schema, check_counts, checked, find, read_json
from benchmarks.quality.official.settings import check_choice, check_names
from benchmarks.quality.official.source import Source
from benchmarks.quality.official.vbench import SAMPLES, VBench, grouped
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import vbench_i2v
from benchmarks.quality.totals.records import in_percent

FILE = "vbench2_i2v_full_info.json"
RATIOS = ("1-1", "7-4", "8-5", "16-9")
QUALITY = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
PER_DIMENSION = {
    "i2v_subject": 246,
    "i2v_background": 109,
    "camera_motion": 763,
    "subject_consistency": 246,
    "background_consistency": 109,
    "temporal_flickering": 355,
    "motion_smoothness": 246,
    "dynamic_degree": 246,
    "aesthetic_quality": 355,
    "imaging_quality": 355,
}
"""Prompts of each dimension that the file lists."""
DIMENSIONS = tuple(name for name in PER_DIMENSION if name != "temporal_flickering")
"""Those of the leaderboard and of the total."""
SCHEMA = Schema(required={"prompt_en": str, "dimension": list, "image_type": str, "image_name": str}, optional={})


@dataclass(frozen=True)
class VBenchI2V(Clips, Sourced):
    """VBench-I2V, five clips of each prompt and first frame.

    Attributes:
        root: Folder with ``vbench2_i2v_full_info.json`` and ``crop/RATIO/``, or the official repository's.
        ratio: Shape of the first frames, width by height: ``1-1``, ``7-4``, ``8-5`` or ``16-9``.
        dimensions: Dimensions; a part gives no total.
    """

    name: ClassVar[str] = "vbench_i2v"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = "VBench-I2V, 1,118 prompts with first frames; Apache-2.0, images of Pexels and Pixabay."
    source: ClassVar[Source] = Source(
        home="https://github.com/Vchitect/VBench/tree/master/vbench2_beta_i2v",
        download=f"{FILE} from the repository's vbench2_beta_i2v/, and crop.zip by its download_data.sh",
        licence="Apache-2.0; images under the licences of Pexels and Pixabay",
    )
    metrics: ClassVar[dict[str, str]] = {
        "i2v_subject": "the subject stays that of the first frame",
        "i2v_background": "the background stays that of the first frame",
        "camera_motion": "the camera moves as told",
        **{name: VBench.metrics[name] for name in QUALITY},
    }
    needs: ClassVar[Needs] = {
        "i2v_subject": (DINO_B16,),
        "i2v_background": (Weights("dreamsim", origin="github.com/ssundaram21/dreamsim"),),
        "camera_motion": (COTRACKER2,),
        "subject_consistency": (DINO_B16,),
        "background_consistency": (CLIP_B32,),
        "motion_smoothness": (AMT_S,),
        "dynamic_degree": (RAFT,),
        "aesthetic_quality": (CLIP_L14, LAION_LINEAR),
        "imaging_quality": (MUSIQ_SPAQ,),
    }

    root: str = "data/vbench_i2v"
    ratio: str = "16-9"
    dimensions: tuple[str, ...] = DIMENSIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("dimensions", self.dimensions, tuple(self.metrics))
        check_choice("ratio", self.ratio, RATIOS)

    def read(self) -> Iterator[Draft]:
        """Clips of each prompt, in the order of the file."""
        folder = f"crop/{self.ratio}"
        if not (self.folder / folder).is_dir():
            folder = f"vbench2_beta_i2v/data/{folder}"
        for number, rows in enumerate(grouped(self._entries(), "image_name")):
            first = rows[0]
            metrics = tuple(name for name in self.dimensions if any(name in row["dimension"] for row in rows))
            for sample in range(SAMPLES if metrics else 0):
                yield Draft(
                    id=f"{number:04d}-{sample}",
                    task="i2v",
                    prompt=first["prompt_en"],
                    output=f"{first['prompt_en']}-{sample}.mp4",
                    metrics=metrics,
                    category=first["image_type"],
                    repeat=sample,
                    images=(f"{folder}/{first['image_name']}",),
                    extra={"entries": len(rows)},
                )

    def prompts(self, drafts: Sequence[Draft]) -> list[str]:
        """The prompt of each entry."""
        return [row["prompt_en"] for row in self._entries()]

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """Total, its parts and the dimensions, in per cent."""
        return [Tally("VBench-I2V", facts(items), in_percent(vbench_i2v.totals), "vbench_i2v")]

    def _entries(self) -> list[Row]:
        path = find(self.source, self.folder / FILE, self.folder / "vbench2_beta_i2v" / FILE)
        rows = list(checked(read_json(path, self.source, list), SCHEMA, path, self.source))
        check_counts([name for row in rows for name in row["dimension"]], PER_DIMENSION, "dimension", path, self.source)
        return rows

"""VBench-2.0: 18 dimensions of text-to-video, mostly judged by local models."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from benchmarks.quality.interface import Item
from benchmarks.quality.official.base import Clips, Made, facts
from benchmarks.quality.official.drafts import Draft
from benchmarks.quality.official.needs import COTRACKER2, RAFT, Judge, Needs, Weights
from benchmarks.quality.official.reading import Row, Schema, check_counts, checked, find, read_json, refuse
from benchmarks.quality.official.settings import check_names
from benchmarks.quality.official.source import Source
from benchmarks.quality.official.vbench import grouped
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import vbench2
from benchmarks.quality.totals.records import in_percent

FILE = "VBench2_full_info.json"
SAMPLES, DIVERSITY_SAMPLES = 3, 20
LETTERS = 180  # of a prompt in a file name
PER_DIMENSION = {
    "Human_Anatomy": 120,
    "Human_Identity": 46,
    "Human_Clothes": 75,
    "Diversity": 10,
    "Composition": 53,
    "Dynamic_Spatial_Relationship": 69,
    "Dynamic_Attribute": 91,
    "Motion_Order_Understanding": 99,
    "Human_Interaction": 100,
    "Complex_Landscape": 30,
    "Complex_Plot": 60,
    "Camera_Motion": 108,
    "Motion_Rationality": 58,
    "Instance_Preservation": 57,
    "Mechanics": 57,
    "Thermotics": 50,
    "Material": 50,
    "Multi-View_Consistency": 97,
}
"""Prompts of each dimension."""
SCHEMA = Schema(required={"prompt_en": str, "dimension": list}, optional={"auxiliary_info": object})
LLAVA = Judge("lmms-lab/LLaVA-Video-7B-Qwen2")
QWEN = Judge("Qwen/Qwen2.5-7B-Instruct")
YOLO_WORLD = Weights(
    "yolo_world_v2_xl_obj365v1_goldg_cc3mlite_pretrain-5daf1395.pth", origin="hub, wondervictor/YOLO-World"
)
ANOMALIES = tuple(
    Weights(f"{part}.pth", origin="the detectors of VBench-2.0's README") for part in ("human", "face", "hand")
)
TOLD_BY_CLIP = (
    "human_clothes",
    "composition",
    "dynamic_spatial_relationship",
    "dynamic_attribute",
    "motion_rationality",
    "mechanics",
    "thermotics",
    "material",
)
"""Dimensions for which a model that sees the clip answers questions."""
TOLD_BY_BOTH = ("complex_landscape", "complex_plot", "human_interaction", "motion_order_understanding")
"""Dimensions for which it describes the clip, and a text model compares."""


def score_name(dimension: str) -> str:
    """Name of a dimension's score, e.g. ``multi_view_consistency`` of ``Multi-View_Consistency``."""
    return dimension.lower().replace("-", "_")


@dataclass(frozen=True)
class VBench2(Clips, Made):
    """VBench-2.0, three clips of each prompt, twenty for ``diversity``.

    A prompt that comes twice in a dimension is made once.

    Attributes:
        root: Folder with ``VBench2_full_info.json``, or with ``vbench2/`` as in the wheel; empty takes the installed
            package ``vbench2``, which is not imported.
        dimensions: Dimensions; a part gives no total.
    """

    name: ClassVar[str] = "vbench2"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = "VBench-2.0, 1,230 prompts in 18 dimensions; Apache-2.0."
    source: ClassVar[Source] = Source(
        home="https://github.com/Vchitect/VBench/tree/master/VBench-2.0",
        download="the wheel: pip download --no-deps vbench2==0.1.1, and unpack it",
        licence="Apache-2.0",
    )
    metrics: ClassVar[dict[str, str]] = {
        "human_anatomy": "bodies, hands and faces are well formed",
        "human_identity": "a person stays the same",
        "human_clothes": "clothes stay the same",
        "diversity": "clips of one prompt differ",
        "composition": "unusual combinations are as told",
        "dynamic_spatial_relationship": "places change as told",
        "dynamic_attribute": "attributes change as told",
        "motion_order_understanding": "actions come in the order told",
        "human_interaction": "persons do together what is told",
        "complex_landscape": "the camera passes all places of a long text",
        "complex_plot": "all events of a long text happen",
        "camera_motion": "the camera moves as told",
        "motion_rationality": "motions have their effects",
        "instance_preservation": "things neither vanish nor multiply",
        "mechanics": "forces act as they should",
        "thermotics": "matter changes its state as it should",
        "material": "materials mix and react as they should",
        "multi_view_consistency": "what is seen from all sides stays the same",
    }
    needs: ClassVar[Needs] = {
        "human_anatomy": (YOLO_WORLD, *ANOMALIES),
        "human_identity": (Weights("resnet18_110.pth", origin="github.com/ronghuaiyang/arcface-pytorch"),),
        "diversity": (Weights("vgg19-dcbb9e9d.pth", origin="download.pytorch.org/models"),),
        **dict.fromkeys(TOLD_BY_CLIP, (LLAVA,)),
        **dict.fromkeys(TOLD_BY_BOTH, (LLAVA, QWEN)),
        "camera_motion": (COTRACKER2,),
        "instance_preservation": (
            Weights(
                "yolo_world_v2_l_obj365v1_goldg_pretrain_1280ft-9babe3f6.pth", origin="hub, wondervictor/YOLO-World"
            ),
        ),
        "multi_view_consistency": (RAFT, COTRACKER2),
    }

    dimensions: tuple[str, ...] = tuple(map(score_name, PER_DIMENSION))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("dimensions", self.dimensions, tuple(self.metrics))

    def read(self) -> Iterator[Draft]:
        """Clips of each prompt, in the order of the file."""
        for number, rows in enumerate(grouped(self._entries(), "dimension")):
            prompt, (dimension,) = rows[0]["prompt_en"], rows[0]["dimension"]
            score = score_name(dimension)
            if score not in self.dimensions:
                continue
            about = [row["auxiliary_info"] for row in rows if "auxiliary_info" in row]
            for sample in range(DIVERSITY_SAMPLES if dimension == "Diversity" else SAMPLES):
                yield Draft(
                    id=f"{number:04d}-{sample}",
                    task="t2v",
                    prompt=prompt,
                    output=f"{dimension}/{prompt[:LETTERS]}-{sample}.mp4",
                    metrics=(score,),
                    category=score,
                    repeat=sample,
                    extra={"entries": len(rows), "auxiliary_info": about},
                )

    def prompts(self, drafts: Sequence[Draft]) -> list[str]:
        """The prompt of each entry."""
        return [row["prompt_en"] for row in self._entries()]

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """Total, its parts and the dimensions, in per cent."""
        return [Tally("VBench-2.0", facts(items), in_percent(vbench2.totals), "vbench2")]

    def _entries(self) -> list[Row]:
        path = find(self.source, *self._places())
        rows = list(checked(read_json(path, self.source, list), SCHEMA, path, self.source))
        for number, row in enumerate(rows):
            if len(row["dimension"]) != 1:
                raise refuse(
                    f"{len(row['dimension'])} dimensions", path, number, "dimension", "an entry has one", self.source
                )
        check_counts([row["dimension"][0] for row in rows], PER_DIMENSION, "dimension", path, self.source)
        return rows

    def _places(self) -> list[Path]:
        if self.root:
            return [self.folder / FILE, self.folder / "vbench2" / FILE]
        installed = find_spec("vbench2")
        folders = (installed.submodule_search_locations if installed else None) or ["vbench2"]
        return [Path(folder) / FILE for folder in folders]

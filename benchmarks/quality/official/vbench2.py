"""VBench-2.0: 18 dimensions of text-to-video, mostly judged by local models."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from benchmarks.quality.official.base import Clips, Made
from benchmarks.quality.official.drafts import Draft
from benchmarks.quality.official.needs import COTRACKER2, RAFT, Judge, Needs, Weights
from benchmarks.quality.official.reading import Row, Schema, check_counts, checked, find, read_json, refuse
from benchmarks.quality.official.settings import check_names
from benchmarks.quality.official.source import Source
from benchmarks.quality.official.vbench import grouped

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
    "Human_Clothes",
    "Composition",
    "Dynamic_Spatial_Relationship",
    "Dynamic_Attribute",
    "Motion_Rationality",
    "Mechanics",
    "Thermotics",
    "Material",
)
"""Dimensions for which a model that sees the clip answers questions."""
TOLD_BY_BOTH = ("Complex_Landscape", "Complex_Plot", "Human_Interaction", "Motion_Order_Understanding")
"""Dimensions for which it describes the clip, and a text model compares."""


@dataclass(frozen=True)
class VBench2(Clips, Made):
    """VBench-2.0, three clips of each prompt, twenty for ``Diversity``.

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
        "Human_Anatomy": "bodies, hands and faces are well formed",
        "Human_Identity": "a person stays the same",
        "Human_Clothes": "clothes stay the same",
        "Diversity": "clips of one prompt differ",
        "Composition": "unusual combinations are as told",
        "Dynamic_Spatial_Relationship": "places change as told",
        "Dynamic_Attribute": "attributes change as told",
        "Motion_Order_Understanding": "actions come in the order told",
        "Human_Interaction": "persons do together what is told",
        "Complex_Landscape": "the camera passes all places of a long text",
        "Complex_Plot": "all events of a long text happen",
        "Camera_Motion": "the camera moves as told",
        "Motion_Rationality": "motions have their effects",
        "Instance_Preservation": "things neither vanish nor multiply",
        "Mechanics": "forces act as they should",
        "Thermotics": "matter changes its state as it should",
        "Material": "materials mix and react as they should",
        "Multi-View_Consistency": "what is seen from all sides stays the same",
    }
    needs: ClassVar[Needs] = {
        "Human_Anatomy": (YOLO_WORLD, *ANOMALIES),
        "Human_Identity": (Weights("resnet18_110.pth", origin="github.com/ronghuaiyang/arcface-pytorch"),),
        "Diversity": (Weights("vgg19-dcbb9e9d.pth", origin="download.pytorch.org/models"),),
        **dict.fromkeys(TOLD_BY_CLIP, (LLAVA,)),
        **dict.fromkeys(TOLD_BY_BOTH, (LLAVA, QWEN)),
        "Camera_Motion": (COTRACKER2,),
        "Instance_Preservation": (
            Weights(
                "yolo_world_v2_l_obj365v1_goldg_pretrain_1280ft-9babe3f6.pth", origin="hub, wondervictor/YOLO-World"
            ),
        ),
        "Multi-View_Consistency": (RAFT, COTRACKER2),
    }

    dimensions: tuple[str, ...] = tuple(PER_DIMENSION)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("dimensions", self.dimensions, tuple(self.metrics))

    def read(self) -> Iterator[Draft]:
        """Clips of each prompt, in the order of the file."""
        for number, rows in enumerate(grouped(self._entries(), "dimension")):
            prompt, (dimension,) = rows[0]["prompt_en"], rows[0]["dimension"]
            if dimension not in self.dimensions:
                continue
            about = [row["auxiliary_info"] for row in rows if "auxiliary_info" in row]
            for sample in range(DIVERSITY_SAMPLES if dimension == "Diversity" else SAMPLES):
                yield Draft(
                    id=f"{number:04d}-{sample}",
                    task="t2v",
                    prompt=prompt,
                    output=f"{dimension}/{prompt[:LETTERS]}-{sample}.mp4",
                    metrics=(dimension,),
                    category=dimension,
                    repeat=sample,
                    extra={"entries": len(rows), "auxiliary_info": about},
                )

    def prompts(self, drafts: Sequence[Draft]) -> list[str]:
        """The prompt of each entry."""
        return [row["prompt_en"] for row in self._entries()]

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

"""OpenS2V-Eval: clips of given subjects."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, get_args

from torch import Tensor

from benchmarks.quality.interface import Item
from benchmarks.quality.metrics.frames import evenly
from benchmarks.quality.metrics.motion import motion_amplitude
from benchmarks.quality.official.base import Clips, Made, Scorer, Sourced, facts
from benchmarks.quality.official.drafts import Draft
from benchmarks.quality.official.needs import CLIP_L14, Judge, Needs, Weights
from benchmarks.quality.official.reading import Row, Schema, check_count, check_counts, checked, read_json, refuse
from benchmarks.quality.official.settings import check_choice
from benchmarks.quality.official.source import Source
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import opens2v
from benchmarks.quality.totals.records import Range

Domain = Literal["open", "human", "single"]
Edition = Literal["v1.1", "v1.0"]
FILES: dict[str, tuple[str, int]] = {
    "open": ("Open-Domain_Eval.json", 180),
    "human": ("Human-Domain_Eval.json", 60),
    "single": ("Single-Domain_Eval.json", 90),
}
"""File and number of items of each domain."""
KINDS = {
    **dict.fromkeys(("singleobj", "singlehuman", "singleface", "multiobject"), 30),
    **dict.fromkeys(("humanobj", "faceobj", "multiface", "multihuman"), 15),
}
"""Items of each kind in the open domain."""
WITH_A_FACE = ("singlehuman", "singleface", "faceobj", "humanobj")
FRAMES = 32  # that most scores look at
KEY = re.compile(r"([a-z]+)_(\d+)")
SCHEMA = Schema(
    required={"img_paths": list, "prompt": str, "class_label": list}, optional={"synthesis_flag": object}, closed=True
)
GME = Weights("Alibaba-NLP/gme-Qwen2-VL-7B-Instruct")


def amplitude(folder: Path, item: Item, pixels: Tensor) -> float:
    """Motion amplitude of 32 frames, from the first to the last, see `motion_amplitude`."""
    return motion_amplitude(pixels[:, evenly(pixels.shape[1], FRAMES)])


@dataclass(frozen=True)
class OpenS2V(Clips, Made, Sourced):
    """OpenS2V-Eval, one clip an item.

    ``extra`` has ``class_label``, a name for each image.

    Attributes:
        root: Folder with the JSON files and ``Images/``.
        domain: ``open``, ``human`` or ``single``; totals of the human domain leave the subject's score out.
        edition: ``v1.1`` or ``v1.0``, which has no score of smoothness.
    """

    name: ClassVar[str] = "opens2v"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = "OpenS2V-Eval 1.1 and 1.0, 180, 60 or 90 items with up to three references; Apache-2.0."
    source: ClassVar[Source] = Source(
        home="https://github.com/PKU-YuanGroup/OpenS2V-Nexus",
        download="hf download --repo-type dataset BestWishYsh/OpenS2V-Eval",
        licence="Apache-2.0",
    )
    metrics: ClassVar[dict[str, str]] = {
        "aesthetics": "frames look good",
        "motion_smoothness": "no frame is an artefact of motion",
        "motion_amplitude": "how much moves",
        "face_sim": "the face is that of the reference",
        "gme_score": "frames show what the text says",
        "nexus_score": "subjects are those of the references",
        "natural_score": "the clip could be real, as a judge says",
    }
    needs: ClassVar[Needs] = {
        "aesthetics": (CLIP_L14, Weights("aesthetic-model.pth", origin="hub, BestWishYsh/OpenS2V-Weight")),
        "motion_smoothness": (Weights("q-future/one-align"),),
        "face_sim": (
            Weights("glint360k_curricular_face_r101_backbone.bin", origin="hub, BestWishYsh/OpenS2V-Weight"),
            Weights("antelopev2", origin="github.com/deepinsight/insightface"),
        ),
        "gme_score": (GME,),
        "nexus_score": (
            GME,
            Weights("yolo_world_v2_l_image_prompt_adapter-719a7afb.pth", origin="hub, wondervictor/YOLO-World"),
        ),
        "natural_score": (Judge("gpt-4o-2024-11-20", answers=3),),
    }

    scorers: ClassVar[dict[str, Scorer]] = {"motion_amplitude": amplitude}
    ranges: ClassVar[Mapping[str, Range]] = opens2v.RANGES

    root: str = "data/OpenS2V-Eval"
    domain: Domain = "open"
    edition: Edition = "v1.1"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("domain", self.domain, get_args(Domain))
        check_choice("edition", self.edition, get_args(Edition))

    def read(self) -> Iterator[Draft]:
        """One item a key, in the order of the file."""
        name, number = FILES[self.domain]
        path = self.folder / name
        content: dict[str, Row] = read_json(path, self.source, dict)
        rows = dict(zip(content, checked(content, SCHEMA, path, self.source), strict=True))
        check_count(len(rows), number, "items", path, self.source)
        kinds = {key: self._kind(key, row) for key, row in rows.items()}
        if self.domain == "open":
            check_counts(list(kinds.values()), KINDS, "kind", path, self.source)
        for key, row in rows.items():
            yield Draft(
                id=key,
                task="r2v",
                prompt=row["prompt"],
                output=f"{key}.mp4",
                metrics=tuple(metric for metric in self.metrics if self._applies(metric, kinds[key])),
                category=kinds[key],
                images=tuple(row["img_paths"]),
                extra={"class_label": row["class_label"]},
            )

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """Total of the edition and domain, and its parts."""
        compute = partial(opens2v.totals, version=self.edition, domain=self.domain)
        return [Tally("OpenS2V-Eval", facts(items), compute, f"opens2v {self.edition} {self.domain}", apart=True)]

    def _applies(self, metric: str, kind: str) -> bool:
        if metric == "face_sim":
            return kind in WITH_A_FACE
        return not (
            (metric == "nexus_score" and self.domain == "human")
            or (metric == "motion_smoothness" and self.edition == "v1.0")
        )

    def _kind(self, key: str, row: Row) -> str:
        path = self.folder / FILES[self.domain][0]
        match = KEY.fullmatch(key)
        if match is None:
            raise refuse(
                f"the key {key!r} is not KIND_NUMBER", path, key, "key", "its kind decides its scores", self.source
            )
        if not 1 <= len(row["img_paths"]) <= 3:
            number = len(row["img_paths"])
            raise refuse(f"{number} images", path, key, "img_paths", "an item has one to three", self.source)
        return match[1]

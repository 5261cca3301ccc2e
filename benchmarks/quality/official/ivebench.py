"""IVEBench: instructed edits of short and long clips."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from torch import Tensor

from benchmarks.quality.interface import Item
from benchmarks.quality.metrics.motion import temporal_flickering
from benchmarks.quality.official.base import Clips, Scorer, Sourced, facts
from benchmarks.quality.official.drafts import Draft, word
from benchmarks.quality.official.needs import AMT_G, CLIP_B32, COTRACKER3, DINO_B16, Judge, Needs, Weights
from benchmarks.quality.official.reading import Schema, checked, read_json
from benchmarks.quality.official.source import Source
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import ivebench
from benchmarks.quality.totals.records import Range
from bernini.errors import DataError

SCHEMA = Schema(
    required={
        "id": object,
        "src_video_name": str,
        "category": str,
        "subcategory": str,
        "source_prompt": str,
        "edit_prompt": str,
        "target_prompt": str,
    },
    optional={"target_phrase": object, "target_span": object},
    closed=False,
)
VIDEOCLIP = Weights("alibaba-pai/VideoCLIP-XL-v2")
QWEN = Judge("Qwen/Qwen2.5-VL-72B-Instruct")


def flickering(folder: Path, item: Item, pixels: Tensor) -> float:
    """See `temporal_flickering`."""
    return temporal_flickering(pixels)


@dataclass(frozen=True)
class IVEBench(Clips, Sourced):
    """IVEBench, one clip a source; its short and its long subset are scored apart.

    The official scripts take frames: ``mp42frames_batch.py`` makes them from the outputs.

    Attributes:
        root: Folder of a subset, with its JSON file and ``videos/``.
        prompts_file: Name of the JSON file; empty for the only one in the folder.
    """

    name: ClassVar[str] = "ivebench"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = "IVEBench, 600 clips with one instruction each, in two subsets; no licence is stated."
    source: ClassVar[Source] = Source(
        home="https://github.com/RyanChenYN/IVEBench",
        download="hf download --repo-type dataset Coraxor/IVEBench",
        licence="none is stated, so that no right to use the data is granted beyond what the authors allow you",
        restricted=True,
    )
    metrics: ClassVar[dict[str, str]] = {
        "SC": "the subject looks the same in all frames",
        "BC": "the background looks the same in all frames",
        "TF": "neighbouring frames are alike",
        "MS": "frames lie on smooth motion between their neighbours",
        "VTSS": "the clip would be fit for training, -0.05 to 0.1",
        "OSC": "the clip shows what the target prompt says",
        "PSC": "the clip shows what the instruction says",
        "IS": "the edit is what was asked for, 1 to 5",
        "QA": "there are as many things as asked for",
        "SF": "the clip means what the source means",
        "MF": "points move as in the source",
        "CF": "what was not asked for stays, 1 to 5",
    }
    needs: ClassVar[Needs] = {
        "SC": (DINO_B16,),
        "BC": (CLIP_B32,),
        "MS": (AMT_G,),
        "VTSS": (Weights("Koala-36M/Training_Suitability_Assessment"),),
        "OSC": (VIDEOCLIP,),
        "PSC": (VIDEOCLIP,),
        "IS": (QWEN,),
        "QA": (Weights("groundingdino_swinb_cogcoor.pth", origin="github.com/IDEA-Research/GroundingDINO"),),
        "SF": (VIDEOCLIP,),
        "MF": (COTRACKER3,),
        "CF": (QWEN,),
    }

    scorers: ClassVar[dict[str, Scorer]] = {"TF": flickering}
    ranges: ClassVar[Mapping[str, Range]] = ivebench.RANGES

    root: str = "data/IVEBench/short"
    prompts_file: str = ""

    def read(self) -> Iterator[Draft]:
        """One item a source, in the order of the file."""
        path = self._file()
        for row in checked(read_json(path, self.source, list), SCHEMA, path, self.source):
            video = PurePosixPath(row["src_video_name"])
            told = ("source_prompt", "target_prompt", "target_phrase", "target_span", "subcategory")
            yield Draft(
                id=word(video.stem),
                task="v2v",
                prompt=row["edit_prompt"],
                output=f"{video.stem}.mp4",
                metrics=tuple(metric for metric in self.metrics if metric != "QA" or _counts(row["subcategory"])),
                category=row["category"],
                videos=(f"videos/{video}",),
                extra={name: row[name] for name in told if name in row},
            )

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """Total, its three groups and the twelve scores of the subset."""
        return [Tally("IVEBench", facts(items), ivebench.totals, "ivebench", apart=True)]

    def _file(self) -> Path:
        if self.prompts_file:
            return self.folder / self.prompts_file
        found = sorted(self.folder.glob("*.json"))
        if len(found) != 1:
            raise DataError(
                f"{len(found)} JSON files instead of one",
                where=str(self.folder),
                why=", ".join(file.name for file in found) or "the folder holds none, or does not exist",
                fix="name it: prompts_file" if found else f"get {self.source.download}",
            )
        return found[0]


def _counts(subcategory: str) -> bool:
    """Whether an edit changes how many there are; only then is it counted."""
    return "quantity" in subcategory.lower() or "number" in subcategory.lower()

"""GenEval: images of objects, their number, colours and places, checked by a detector."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from benchmarks.quality.interface import Item
from benchmarks.quality.official.base import Made, facts
from benchmarks.quality.official.drafts import Draft
from benchmarks.quality.official.needs import CLIP_L14, Needs, Weights
from benchmarks.quality.official.reading import Schema, check_counts, checked, find, read_lines
from benchmarks.quality.official.source import Source
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import geneval

FILE, SAMPLES = "evaluation_metadata.jsonl", 4
PER_TAG = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
"""Prompts of each task."""
SCHEMA = Schema(required={"tag": str, "include": object, "prompt": str}, optional={"exclude": object})


@dataclass(frozen=True)
class GenEval(Made):
    """GenEval, four images a prompt.

    ``extra`` has ``include`` and ``exclude``, as the file has them.

    Attributes:
        root: Folder with ``evaluation_metadata.jsonl``, or the official repository's.
    """

    name: ClassVar[str] = "geneval"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = "GenEval, 553 prompts of six tasks; MIT."
    source: ClassVar[Source] = Source(
        home="https://github.com/djghosh13/geneval",
        download=f"prompts/{FILE} of the repository",
        licence="MIT",
    )
    metrics: ClassVar[dict[str, str]] = {"correct": "everything asked for is there, and nothing that was excluded"}
    needs: ClassVar[Needs] = {
        "correct": (
            Weights("mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth", origin="download.openmmlab.com/mmdetection"),
            CLIP_L14,
        )
    }

    root: str = "data/geneval"
    height: int = 512
    width: int = 512

    def read(self) -> Iterator[Draft]:
        """Images of each prompt, in the order of the file."""
        path = find(self.source, self.folder / FILE, self.folder / "prompts" / FILE)
        rows = list(checked(read_lines(path, self.source), SCHEMA, path, self.source))
        check_counts([row["tag"] for row in rows], PER_TAG, "tag", path, self.source)
        for number, row in enumerate(rows):
            for sample in range(SAMPLES):
                yield Draft(
                    id=f"{number:05d}-{sample}",
                    task="t2i",
                    prompt=row["prompt"],
                    output=f"{number:05d}/samples/{sample:04d}.png",
                    metrics=("correct",),
                    category=row["tag"],
                    repeat=sample,
                    extra={name: row[name] for name in ("include", "exclude") if name in row},
                )

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """Overall score and the six tasks."""
        return [Tally("GenEval", facts(items), geneval.totals, "geneval")]

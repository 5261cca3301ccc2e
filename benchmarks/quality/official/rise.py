"""RISEBench: edits of images that take reasoning."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from benchmarks.quality.interface import Item
from benchmarks.quality.official.base import Sourced, facts
from benchmarks.quality.official.drafts import Draft, word
from benchmarks.quality.official.needs import Judge, Needs
from benchmarks.quality.official.reading import Row, Schema, check_counts, checked, read_json
from benchmarks.quality.official.source import Source
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import rise
from benchmarks.quality.totals.records import Range

FILE = "datav2_total_w_subtask.json"
PER_CATEGORY = {"temporal_reasoning": 85, "causal_reasoning": 90, "spatial_reasoning": 100, "logical_reasoning": 85}
"""Items of each category."""
REFERENCES = ("reference", "reference_txt", "reference_img", "reasoning_img", "reasoning_img_op", "reasoning_wo_ins")
TOLD = (*REFERENCES, "subtask", "consistency_free")
SCHEMA = Schema(
    required={"index": str, "category": str, "instruction": str, "image": str},
    optional=dict.fromkeys(TOLD, object),
    closed=False,
)


@dataclass(frozen=True)
class RISE(Sourced):
    """RISEBench, one image an item.

    ``extra`` has what the judge is told: ``reference`` and its kin, as the file has them.

    Attributes:
        root: Folder with ``datav2_total_w_subtask.json`` and ``data/``.
    """

    name: ClassVar[str] = "rise"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = "RISEBench, 360 edits of four kinds of reasoning; no licence is stated."
    source: ClassVar[Source] = Source(
        home="https://github.com/PhoenixZ810/RISEBench",
        download="hf download --repo-type dataset PhoenixZ/RISEBench, and unpack data.zip",
        licence="none is stated, so that no right to use the data is granted beyond what the authors allow you",
        restricted=True,
    )
    metrics: ClassVar[dict[str, str]] = {
        "reasoning": "the edit is what follows from the instruction, 1 to 5",
        "consistency": "what was not asked for stays, 1 to 5",
        "plausibility": "the image could be real, 1 to 5",
    }
    ranges: ClassVar[dict[str, Range]] = dict.fromkeys(metrics, Range(1, 5))
    needs: ClassVar[Needs] = dict.fromkeys(metrics, (Judge("gpt-4.1-2025-04-14"),))

    root: str = "data/RISEBench"
    max_edge: int = 1024

    def read(self) -> Iterator[Draft]:
        """One item an entry, in the order of the file."""
        path = self.folder / FILE
        rows = list(checked(read_json(path, self.source, list), SCHEMA, path, self.source))
        check_counts([row["category"] for row in rows], PER_CATEGORY, "category", path, self.source)
        for row in rows:
            yield Draft(
                id=word(row["index"]),
                task="i2i",
                prompt=row["instruction"],
                output=f"images/{row['category']}/{row['index']}.png",
                metrics=tuple(metric for metric in self.metrics if _applies(metric, row)),
                category=row["category"].removesuffix("_reasoning"),
                images=(f"data/{row['image']}",),
                extra={name: row[name] for name in TOLD if name in row},
            )

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """Accuracy and score, and the accuracies that are printed."""
        named = facts(items)
        return [
            Tally("RISEBench", named, rise.totals),
            Tally("RISEBench, accuracy", named, rise.accuracies, "rise"),
        ]


def _applies(metric: str, row: Row) -> bool:
    """Whether an item gets a score: puzzles are not judged by looks, and some edits are free to change all else."""
    if metric == "plausibility":
        return bool(row["category"] != "logical_reasoning")
    return metric != "consistency" or "consistency_free" not in row

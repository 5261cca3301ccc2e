"""Bernini-Bench: its taxonomy and protocol over prompts of one's own, since its own are not public."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from benchmarks.quality.interface import Item
from benchmarks.quality.official.base import Clips, Sourced, facts
from benchmarks.quality.official.drafts import Draft, word
from benchmarks.quality.official.needs import Judge, Needs
from benchmarks.quality.official.reading import Schema, checked, read_lines, refuse
from benchmarks.quality.official.source import Source
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import bernini_bench
from benchmarks.quality.totals.bernini_bench import CATEGORIES
from benchmarks.quality.totals.records import Range

FILE = "prompts.jsonl"
SCHEMA = Schema(required={"id": str, "category": str, "instruction": str, "video": str}, optional={"images": list})


@dataclass(frozen=True)
class BerniniBench(Clips, Sourced):
    """Edits of 22 categories, those with references apart, each scored 1 to 5 by one judge.

    ``prompts.jsonl`` has one entry a line: ``id``, ``category``, ``instruction``, ``video``, and
    for an edit with references ``images``; paths are relative to the folder. The published set has ten of each
    category, and ten of eight of them with references, 300 in all. Figures of another set do not compare with it.

    Attributes:
        root: Folder with ``prompts.jsonl``.
    """

    name: ClassVar[str] = "bernini_bench"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = (
        "Bernini-Bench's categories and scores over prompts of your own: its own are not public, and figures do not "
        "compare with published ones."
    )
    source: ClassVar[Source] = Source(
        home="https://github.com/bytedance/Bernini",
        download="prompts and clips of your own: docs/official.md says in which form",
        licence="yours",
    )
    metrics: ClassVar[dict[str, str]] = {
        "OS": "the edit as a whole, judged apart, 1 to 5",
        "IF": "the edit is what was asked for, 1 to 5",
        "VC": "what was not asked for stays, 1 to 5",
        "IC": "what references show is recognised, 1 to 5",
        "GQ": "the clip looks good, 1 to 5",
    }
    ranges: ClassVar[dict[str, Range]] = dict.fromkeys(metrics, Range(1, 5))
    needs: ClassVar[Needs] = dict.fromkeys(metrics, (Judge("gpt-5.4"),))

    root: str = "data/bernini_bench"

    def read(self) -> Iterator[Draft]:
        """Edits without references first."""
        path = self.folder / FILE
        rows = list(checked(read_lines(path, self.source), SCHEMA, path, self.source))
        for number, row in enumerate(rows):
            if row["category"] not in CATEGORIES:
                what, why = f"unknown category {row['category']!r}", f"there are {', '.join(CATEGORIES)}"
                raise refuse(what, path, number, "category", why, self.source)
            if row["id"] != word(row["id"]):
                raise refuse(
                    f"the id {row['id']!r} is no word", path, number, "id", "files are named by it", self.source
                )
        for task, own in (
            ("v2v", [r for r in rows if "images" not in r]),
            ("rv2v", [r for r in rows if "images" in r]),
        ):
            for row in own:
                yield Draft(
                    id=row["id"],
                    task=task,
                    prompt=row["instruction"],
                    output=f"{task}/{row['id']}.mp4",
                    metrics=tuple(name for name in self.metrics if task == "rv2v" or name != "IC"),
                    category=row["category"],
                    videos=(row["video"],),
                    images=tuple(row.get("images", ())),
                )

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """Each score and its groups, with references and without; printed figures are of other prompts."""
        tasks: tuple[Literal["v2v", "rv2v"], ...] = ("v2v", "rv2v")
        by_task = {task: [item for item in items if item.task == task] for task in tasks}
        return [
            Tally(f"Bernini-Bench, {task}", facts(own), partial(bernini_bench.totals, task=task))
            for task, own in by_task.items()
            if own
        ]

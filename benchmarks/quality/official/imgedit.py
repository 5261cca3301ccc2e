"""ImgEdit-Bench: instructed edits of images, scored by a judge."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from benchmarks.quality.interface import Item
from benchmarks.quality.official.base import Sourced, facts
from benchmarks.quality.official.drafts import Draft
from benchmarks.quality.official.needs import Judge, Needs
from benchmarks.quality.official.reading import Schema, check_count, check_counts, checked, find, read_json
from benchmarks.quality.official.settings import check_choice
from benchmarks.quality.official.source import Source
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import imgedit
from benchmarks.quality.totals.records import Range

Split = Literal["basic", "uge"]
PER_TYPE = {
    "add": 95,
    "adjust": 94,
    "extract": 117,
    "replace": 92,
    "remove": 86,
    "background": 94,
    "style": 100,
    "compose": 23,
    "action": 36,
}
"""Items of each type of the basic split, in the order of the published tables."""
HARD, UGE = "uge", 47
"""Category and score of the hard split, and its items."""
FILES = {"basic": ("basic_edit.json", "singleturn.json"), "uge": ("UGE_edit.json", "UGE/UGE_edit.json")}
"""Names of each split's file: in the code's repository, and in the data's."""


@dataclass(frozen=True)
class ImgEdit(Sourced):
    """ImgEdit-Bench, one image an item.

    Attributes:
        root: Folder with the JSON file and the images, in folders as its ``id`` fields name them.
        split: ``basic``, nine types of edit, or ``uge``, the hard edits without a type.
    """

    name: ClassVar[str] = "imgedit"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = "ImgEdit-Bench, 737 edits of nine types, and 47 hard ones; no licence is stated."
    source: ClassVar[Source] = Source(
        home="https://github.com/PKU-YuanGroup/ImgEdit",
        download="hf download --repo-type dataset sysuyy/ImgEdit Benchmark.tar, and unpack it",
        licence="none is stated, so that no right to use the data is granted beyond what the authors allow you",
        restricted=True,
    )
    metrics: ClassVar[dict[str, str]] = {
        "first": "the edit is what was asked for, 1 to 5",
        "second": "the type's second question, mostly how seamless the edit is, 1 to 5",
        "third": "the type's third question, mostly what stays, 1 to 5",
        HARD: "a hard edit as a whole, 1 to 5",
    }
    ranges: ClassVar[dict[str, Range]] = dict.fromkeys(metrics, Range(1, 5))
    needs: ClassVar[Needs] = dict.fromkeys(metrics, (Judge("gpt-4.1-2025-04-14"),))

    root: str = "data/ImgEdit"
    split: Split = "basic"
    max_edge: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split", self.split, get_args(Split))

    def read(self) -> Iterator[Draft]:
        """One item a key, in the order of the file."""
        path = find(self.source, *(self.folder / name for name in FILES[self.split]))
        content: dict[str, Any] = read_json(path, self.source, dict)
        typed = {"edit_type": str} if self.split == "basic" else {}
        schema = Schema(required={"id": str, "prompt": str, **typed}, optional={})
        rows = dict(zip(content, checked(content, schema, path, self.source), strict=True))
        if typed:
            check_counts([row["edit_type"] for row in rows.values()], PER_TYPE, "edit_type", path, self.source)
        else:
            check_count(len(rows), UGE, "items", path, self.source)
        below = path.parent.relative_to(self.folder)
        for key, row in rows.items():
            yield Draft(
                id=key,
                task="i2i",
                prompt=row["prompt"],
                output=f"{key}.png",
                metrics=imgedit.SCORES if typed else (HARD,),
                category=row.get("edit_type", HARD),
                images=(str(below / row["id"]),),
            )

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """Overall score and the nine types; hard edits have a plain mean, which the table shows."""
        return [Tally("ImgEdit-Bench", facts(items), imgedit.totals, "imgedit")] if self.split == "basic" else []

"""DPG-Bench: images of long prompts, asked about by questions that depend on one another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.quality.interface import Item
from benchmarks.quality.official.base import Made, facts
from benchmarks.quality.official.drafts import Draft, word
from benchmarks.quality.official.needs import Needs, Weights
from benchmarks.quality.official.reading import Row, Schema, check_count, checked, read_csv, refuse
from benchmarks.quality.official.source import Source
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import dpg

FILE, ITEMS, SAMPLES = "dpg_bench.csv", 1065, 4
SCHEMA = Schema(
    required={
        "item_id": str,
        "text": str,
        "proposition_id": str,
        "dependency": str,
        "category_broad": str,
        "tuple": str,
        "question_natural_language": str,
    },
    optional={"keywords": object, "category_detailed": object},
)


@dataclass(frozen=True)
class DPG(Made):
    """DPG-Bench, four images a prompt: the quarters of the official grid, row by row.

    ``extra["questions"]`` has ``id``, ``question``, ``parents``, ``tuple``, ``category`` and ``row`` of each question;
    the official script leaves out row 0.

    Attributes:
        root: Folder with ``dpg_bench.csv``, or the official repository's.
    """

    name: ClassVar[str] = "dpg"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = "DPG-Bench, 1,065 long prompts with questions; Apache-2.0."
    source: ClassVar[Source] = Source(
        home="https://github.com/TencentQQGYLab/ELLA",
        download=f"dpg_bench/{FILE} of the repository",
        licence="Apache-2.0",
    )
    metrics: ClassVar[dict[str, str]] = {"score": "share of questions that are answered yes, and whose parents are"}
    needs: ClassVar[Needs] = {
        "score": (Weights("damo/mplug_visual-question-answering_coco_large_en", origin="modelscope.cn"),)
    }

    root: str = "data/dpg_bench"
    height: int = 512
    width: int = 512

    def read(self) -> Iterator[Draft]:
        """Images of each prompt, in the order of the file."""
        path = self.folder / FILE
        if not path.is_file() and (self.folder / "dpg_bench" / FILE).is_file():
            path = self.folder / "dpg_bench" / FILE
        asked: dict[str, list[Row]] = {}
        for number, row in enumerate(checked(read_csv(path, self.source), SCHEMA, path, self.source)):
            asked.setdefault(row["item_id"], []).append({**row, "row": number})
        check_count(len(asked), ITEMS, "prompts", path, self.source)
        for key, rows in asked.items():
            questions = self._questions(rows, path)
            for sample in range(SAMPLES):
                yield Draft(
                    id=f"{word(key)}-{sample}",
                    task="t2i",
                    prompt=rows[0]["text"],
                    output=f"{key}/{sample}.png",
                    metrics=("score",),
                    repeat=sample,
                    extra={"questions": questions},
                )

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """The overall score, over all images."""
        return [Tally("DPG-Bench", facts(items), dpg.totals)]

    def _questions(self, rows: list[Row], path: Path) -> list[dict[str, Any]]:
        questions: list[dict[str, Any]] = []
        for row in rows:
            number = row["row"]
            try:
                one, parents = int(row["proposition_id"]), [int(part) for part in row["dependency"].split(",")]
            except ValueError as error:
                raise refuse(str(error), path, number, "dependency", "ids are integers", self.source) from error
            if row["text"] != rows[0]["text"]:
                raise refuse("another text", path, number, "text", "an item has one", self.source)
            questions.append(
                {
                    "id": one,
                    "question": row["question_natural_language"],
                    "parents": [parent for parent in parents if parent],
                    "tuple": row["tuple"],
                    "category": row["category_broad"],
                    "row": number,
                }
            )
        known = {question["id"] for question in questions}
        for question in questions:
            if unknown := sorted({*question["parents"]} - known):
                what, why = f"question {unknown[0]} does not exist", f"the item has {sorted(known)}"
                raise refuse(what, path, question["row"], "dependency", why, self.source)
        return questions

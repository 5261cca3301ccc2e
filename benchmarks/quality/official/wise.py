"""WISE: images that take knowledge of the world."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from benchmarks.quality.interface import Item
from benchmarks.quality.official.base import Made, facts
from benchmarks.quality.official.drafts import Draft
from benchmarks.quality.official.needs import Judge, Needs
from benchmarks.quality.official.reading import Schema, check_count, checked, read_json, refuse
from benchmarks.quality.official.source import Source
from benchmarks.quality.tallying import Tally
from benchmarks.quality.totals import wise
from benchmarks.quality.totals.records import Range

STEMS = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
PROMPTS = 1000
SCHEMA = Schema(
    required={"prompt_id": int, "Prompt": str, "Explanation": str, "Category": str, "Subcategory": str}, optional={}
)
CATEGORIES = ("culture", "time", "space", "biology", "physics", "chemistry")


@dataclass(frozen=True)
class WISE(Made):
    """WISE_Verified, one image a prompt, right or wrong.

    ``extra`` has ``explanation`` and ``subcategory``; the category follows from the number, as in the official code.

    Attributes:
        root: Folder of the official repository.
    """

    name: ClassVar[str] = "wise"
    version: ClassVar[str] = "1"
    notes: ClassVar[str] = "WISE_Verified, 1,000 prompts of six categories; no licence is stated."
    source: ClassVar[Source] = Source(
        home="https://github.com/PKU-YuanGroup/WISE",
        download="the repository: git clone https://github.com/PKU-YuanGroup/WISE",
        licence="none is stated, so that no right to use the data is granted beyond what the authors allow you",
        restricted=True,
    )
    metrics: ClassVar[dict[str, str]] = {"correct": "the image shows what the text means, and is usable: 0 or 1"}
    needs: ClassVar[Needs] = {"correct": (Judge("Qwen3.5-35B-A3B"),)}
    files: ClassVar[tuple[str, ...]] = tuple(f"data_verified/{stem}_verified.json" for stem in STEMS)
    last: ClassVar[tuple[int, ...]] = (400, 520, 640, 760, 880, 1000)
    """Last number of each category."""

    root: str = "data/WISE"
    height: int = 512
    width: int = 512

    def read(self) -> Iterator[Draft]:
        """One item a prompt, file by file."""
        seen: set[int] = set()
        for name in self.files:
            path = self._place(name)
            for number, row in enumerate(checked(read_json(path, self.source, list), SCHEMA, path, self.source)):
                key = row["prompt_id"]
                if not 1 <= key <= PROMPTS or key in seen:
                    why = f"each of 1 to {PROMPTS} comes once"
                    raise refuse(f"the number {key}", path, number, "prompt_id", why, self.source)
                seen.add(key)
                yield Draft(
                    id=str(key),
                    task="t2i",
                    prompt=row["Prompt"],
                    output=f"{key}.png",
                    metrics=tuple(self.metrics),
                    category=next(kind for kind, end in zip(CATEGORIES, self.last, strict=True) if key <= end),
                    extra={"explanation": row["Explanation"], "subcategory": row["Subcategory"]},
                )
        check_count(len(seen), PROMPTS, "prompts", self.folder, self.source)

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """Overall score and the six categories."""
        return [Tally("WISE, verified", facts(items), wise.totals, "wise")]

    def _place(self, name: str) -> Path:
        return self.folder / name


@dataclass(frozen=True)
class WISELegacy(WISE):
    """The first WISE, with three scores.

    Attributes:
        root: Folder of the official repository, as it is or as it was.
    """

    name: ClassVar[str] = "wise_legacy"
    notes: ClassVar[str] = "WISE as first published, 1,000 prompts of six categories; no licence is stated."
    metrics: ClassVar[dict[str, str]] = {
        "consistency": "the image shows what the text means, 0 to 2",
        "realism": "it looks real, 0 to 2",
        "aesthetic_quality": "it looks good, 0 to 2",
    }
    ranges: ClassVar[dict[str, Range]] = dict.fromkeys(metrics, Range(0, 2))
    needs: ClassVar[Needs] = dict.fromkeys(metrics, (Judge("gpt-4o-2024-05-13"),))
    files: ClassVar[tuple[str, ...]] = tuple(f"data/{stem}.json" for stem in STEMS)
    last: ClassVar[tuple[int, ...]] = (400, 567, 700, 800, 900, 1000)

    def tallies(self, items: Sequence[Item]) -> list[Tally]:
        """Overall WiScore and the six categories."""
        return [Tally("WISE, legacy", facts(items), wise.legacy, "wise_legacy")]

    def _place(self, name: str) -> Path:
        now = self.folder / "WISE_legacy" / name
        return now if now.is_file() else self.folder / name

"""GEdit-Bench: an image before and after an edit, two scores from 0 to 10, and two more of the edited image alone."""

from functools import partial
from pathlib import Path

from torch import Tensor

from benchmarks.quality.inquiries.base import INSTRUCTION, Inquiry, Rubric, instruction
from benchmarks.quality.inquiries.pairs import before_after
from benchmarks.quality.interface import Item
from benchmarks.quality.judging.forms import JsonIntegers
from benchmarks.quality.judging.question import Question
from benchmarks.quality.judging.showing import Encoding, Shown
from benchmarks.quality.official.gedit import GEdit
from bernini.media import read_image, resize

ENCODING = Encoding(long_edge=1024)
PARTS = {"semantic": ("success", "over_editing"), "quality": ("naturalness", "artefacts")}
"""Scores of each question."""
SEMANTIC = f"""You see an image before and after an edit. Rate the edit.

The edit that was asked for: {INSTRUCTION}

Give two whole numbers from 0 to 10.
First: is what was asked for done? 0: not at all; 5: in part; 10: exactly.
Second: has only that changed?
0: it is another image; 5: the rest has visibly changed; 10: the least change that does it.

Answer with a JSON object {{"score": [first, second]}} and nothing else."""
QUALITY = """You see an image that was edited. Rate how it looks, whatever it shows.

Give two whole numbers from 0 to 10.
First: does it look natural, with light, shadows, sizes and distances that fit?
0: not at all; 10: as a photograph or a drawing does.
Second: is it free of artefacts, such as distortions, seams, blur, broken hands or faces?
0: full of them; 10: none.

Answer with a JSON object {"score": [first, second]} and nothing else."""


class GEditInquiry(Inquiry[GEdit]):
    """Two questions an item; outputs are shown in the size of their sources."""

    scores = tuple(name for names in PARTS.values() for name in names)
    own = Rubric("own-1", {"semantic": SEMANTIC, "quality": QUALITY})
    shown = "1"

    def questions(self, item: Item, output: Path) -> list[Question]:
        """Both images and the instruction, then the output alone."""
        before = Shown(partial(self._source, item), encoding=ENCODING)
        after = Shown(partial(self._fitted, item, output), encoding=ENCODING)
        pictures = {"semantic": before_after(before, after), "quality": (after,)}
        return [
            self.question(
                item,
                (*pictures[part], self.rubric.text(part, instruction=instruction(item))),
                JsonIntegers({"score": names}, 0, 10),
                part=part,
            )
            for part, names in PARTS.items()
        ]

    def _source(self, item: Item) -> Tensor:
        (pixels,) = self.benchmark.sources(item)[1]
        assert isinstance(pixels, Tensor)
        return pixels

    def _fitted(self, item: Item, output: Path) -> Tensor:
        pixels = read_image(output).pixels
        assert pixels is not None
        return resize(pixels, *self._source(item).shape[2:])

"""ImgEdit-Bench: an image before and after an edit, three scores from 1 to 5, or one where edits have no type.

As in the official rubrics, the second and the third score are not to be above the first. The words are our own.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.inquiries.base import INSTRUCTION, Inquiry, Rubric, instruction
from benchmarks.quality.inquiries.pairs import before_after
from benchmarks.quality.interface import Item
from benchmarks.quality.judging.forms import Labelled, Lines
from benchmarks.quality.judging.judged import Cap
from benchmarks.quality.judging.question import Question
from benchmarks.quality.judging.showing import Encoding, Shown
from benchmarks.quality.official.imgedit import HARD, PER_TYPE, ImgEdit
from benchmarks.quality.totals.imgedit import SCORES

ENCODING = Encoding(long_edge=1024)
LABELS = dict(zip(SCORES, ("Instruction compliance", "Seamlessness", "Preservation"), strict=True))
ASKED = {
    "add": "Something is to be there that was not, in the right place, light and size.",
    "adjust": "A property of something is to change, such as its colour, and its shape is to stay.",
    "extract": "One thing is to be cut out, whole and with clean edges, before a plain background.",
    "replace": "One thing is to give way to another, which fits where it stood.",
    "remove": "One thing is to vanish without a trace, and what it hid is to be filled in.",
    "background": "The surroundings are to change, and who or what is in front of them is to stay.",
    "style": "The look of the whole image is to change, and what it shows is to stay.",
    "compose": "Several edits are asked for at once, and each of them counts.",
    "action": "Somebody is to do something else or hold another pose, and is to be recognised.",
}
"""What counts in each type of edit."""
RUBRIC = f"""You see an image before and after an edit. Rate the edit.

The edit that was asked for: {INSTRUCTION}
{{asked}}

Give three whole numbers from 1 to 5.
{LABELS["first"]}: is what was asked for done, all of it, and nothing else?
1: not at all; 3: in part; 5: exactly.
{LABELS["second"]}: does the edited image look as if it had been so from the start?
1: broken; 3: visible seams or flaws; 5: flawless.
{LABELS["third"]}: is all that was not to change as before, in detail?
1: it is another image; 3: visible changes; 5: nothing changed.
No number is larger than the one for instruction compliance.

Answer with three lines, each a label, a colon and its number, and nothing else."""
ALONE = f"""You see an image before and after an edit. Rate the edit.

The edit that was asked for: {INSTRUCTION}

Give one whole number from 1 to 5 for all of this together: what was asked for is done, neither more nor less; the image
looks natural; all else is as before. If all else is not as before, give 3 at most.
1: nothing of it; 3: in part, or with visible flaws; 5: all of it, without a flaw.

Answer with one line: the word Score, a colon and the number."""


class ImgEditInquiry(Inquiry[ImgEdit]):
    """One question an item."""

    scores = (*SCORES, HARD)
    own = Rubric("own-1", {**{kind: RUBRIC.format(asked=asked) for kind, asked in ASKED.items()}, HARD: ALONE})
    shown = "1"

    def __init__(self, benchmark: ImgEdit, rubric: Path | None = None) -> None:
        super().__init__(benchmark, rubric)
        self.cap = Cap("first", ("second", "third")) if benchmark.split == "basic" else None

    def text_keys(self) -> Sequence[str]:
        """The types, or the one text of hard edits."""
        return tuple(PER_TYPE) if self.benchmark.split == "basic" else (HARD,)

    def questions(self, item: Item, output: Path) -> list[Question]:
        """Both images, by the rubric of the item's type."""
        typed = item.category != HARD
        labels = LABELS if typed else {HARD: "Score"}
        form = Labelled(labels, 1, 5) if self.rubric.is_own else Lines(tuple(labels), 1, 5)
        before, after = (Shown(path, encoding=ENCODING) for path in (self.benchmark.sources(item)[1][0], output))
        text = self.rubric.text(item.category, instruction=instruction(item))
        return [self.question(item, (*before_after(before, after), text), form)]

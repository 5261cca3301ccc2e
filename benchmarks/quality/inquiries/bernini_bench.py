"""Bernini-Bench's protocol: a clip before and after an edit; its scores from 1 to 5, the overall one judged apart.

The authors have published no rubric: this one is in our own words, and its figures compare with nobody else's.
"""

from pathlib import Path

from benchmarks.quality.inquiries.base import INSTRUCTION, Inquiry, Rubric, instruction
from benchmarks.quality.inquiries.pairs import before_after, clips
from benchmarks.quality.interface import Item
from benchmarks.quality.judging.forms import Labelled
from benchmarks.quality.judging.question import Question
from benchmarks.quality.judging.showing import Encoding, Shown
from benchmarks.quality.official.bernini_bench import BerniniBench

MOMENTS = 16
ENCODING = Encoding(long_edge=512, quality=90)
OVERALL = {"OS": "Overall"}
LABELS = {"IF": "Instruction following", "VC": "Consistency", "IC": "Identity", "GQ": "Quality"}
EDITS = f"""You see a clip before and after an edit.

The edit that was asked for: {INSTRUCTION}
"""
ASKED = {
    "IF": f"{LABELS['IF']}: is what was asked for done, all of it? 1: not at all; 3: in part; 5: exactly.",
    "VC": f"{LABELS['VC']}: is all else as before, throughout? 1: it is another clip; 3: visible changes; 5: it is.",
    "IC": f"{LABELS['IC']}: are the reference images recognised? 1: not at all; 3: by some traits; 5: at once.",
    "GQ": f"{LABELS['GQ']}: does the edited clip look good, real and stable? 1: broken; 3: visible flaws; 5: flawless.",
}


def rubric(references: bool) -> str:
    """The text that asks for all scores but the overall one."""
    lines = "\n".join(asked for name, asked in ASKED.items() if references or name != "IC")
    return f"""{EDITS}
Give whole numbers from 1 to 5.
{lines}

Answer with a line for each, of its label, a colon and its number, and nothing else."""


TEXTS = {
    "overall": f"""{EDITS}
As whoever asked for it: how good is this edit, all in all?
1: useless; 2: poor; 3: it will do; 4: good; 5: nothing is to be wished for.

Answer with one line: the word {OVERALL["OS"]}, a colon and a whole number from 1 to 5.""",
    "v2v": rubric(references=False),
    "rv2v": rubric(references=True),
}


class BerniniBenchInquiry(Inquiry[BerniniBench]):
    """Two questions an item."""

    scores = (*OVERALL, *LABELS)
    own = Rubric("own-1", TEXTS)
    shown = "1"

    def questions(self, item: Item, output: Path) -> list[Question]:
        """Both clips and the references, for the overall score, then for the others."""
        content = before_after(*clips(self.benchmark, item, output, MOMENTS, ENCODING))
        for number, path in enumerate(self.benchmark.sources(item)[1], 1):
            content += (f"Reference image {number}:", Shown(path, encoding=ENCODING))
        labels = {name: label for name, label in LABELS.items() if name in item.metrics}
        return [
            self.question(
                item,
                (*content, self.rubric.text(key, instruction=instruction(item))),
                Labelled(asked, 1, 5),
                part="overall" if asked is OVERALL else "parts",
            )
            for key, asked in (("overall", OVERALL), (item.task, labels))
        ]

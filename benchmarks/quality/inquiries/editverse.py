"""EditVerseBench: three frames before and after an edit, each scored from 0 to 9.

Frames are those of the official script, three where their number divides by three, else four or more. A judge of the
official rubric states a total; by ours it gives the three parts from 0 to 3, which are summed here.
"""

from pathlib import Path

from benchmarks.quality.inquiries.base import INSTRUCTION, Inquiry, Rubric, instruction
from benchmarks.quality.inquiries.pairs import before_after, moments
from benchmarks.quality.interface import Item
from benchmarks.quality.judging.forms import Labelled, Sum
from benchmarks.quality.judging.question import Question
from benchmarks.quality.judging.showing import Encoding
from benchmarks.quality.metrics.frames import editverse_judged
from benchmarks.quality.official.editverse import EditVerse

ENCODING = Encoding(long_edge=None, quality=95)
SCORE = "editing_quality"
LABELS = {"instruction": "Instruction", "quality": "Quality", "background": "Background"}
RUBRIC = f"""You see a frame of a clip before and after an edit. Rate the edit.

The edit that was asked for: {INSTRUCTION}

Give three whole numbers from 0 to 3.
{LABELS["instruction"]}: is what was asked for done? 0: not at all; 1: a part of it; 2: nearly all; 3: exactly.
{LABELS["quality"]}: does what was edited look real? 0: broken; 1: bad flaws; 2: small flaws; 3: flawless.
{LABELS["background"]}: is all else as before? 0: it is lost; 1: large changes; 2: small changes; 3: nothing changed.

Answer with three lines, each a label, a colon and its number, and nothing else."""


class EditVerseInquiry(Inquiry[EditVerse]):
    """One question a frame; their scores are averaged."""

    scores = (SCORE,)
    own = Rubric("own-1", {"frame": RUBRIC})
    shown = "1"

    def questions(self, item: Item, output: Path) -> list[Question]:
        """A frame of the output and the source's of the same moment, each by itself."""
        total = Labelled({SCORE: "Total score"}, 0, 9)
        form = Sum(SCORE, Labelled(LABELS, 0, 3)) if self.rubric.is_own else total
        text = self.rubric.text("frame", instruction=instruction(item))
        asked = []
        for index in editverse_judged(item.expect.frames, item.expect.frames):
            pair = moments(self.benchmark, item, output, (index,), ENCODING)
            asked.append(self.question(item, (*before_after(*pair), text), form, part=f"frame-{index}"))
        return asked

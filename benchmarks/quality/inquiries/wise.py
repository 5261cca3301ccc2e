"""WISE: an image and what its text means; right or wrong, or in the older form three scores from 0 to 2."""

from pathlib import Path
from typing import ClassVar

from benchmarks.quality.inquiries.base import INSTRUCTION, Inquiry, Rubric, instruction
from benchmarks.quality.interface import Item
from benchmarks.quality.judging.forms import Form, Labelled, YesNo
from benchmarks.quality.judging.question import Question
from benchmarks.quality.judging.showing import Encoding, Shown
from benchmarks.quality.official.wise import WISE

ENCODING = Encoding(long_edge=1024)
TOLD = f"""You see an image that was made for a text.

The text: {INSTRUCTION}
What it means: <explanation>
"""
VERIFIED = f"""{TOLD}
Does the image show what the text means, all of it and recognisably, without a flaw that spoils it?

Answer with the word yes or the word no, and nothing else."""
LABELS = {"consistency": "Consistency", "realism": "Realism", "aesthetic_quality": "Aesthetic quality"}
LEGACY = f"""{TOLD}
Give three whole numbers from 0 to 2, and 2 only where nothing at all is to be wished for.
{LABELS["consistency"]}: does the image show what the text means? 0: no; 1: in part; 2: all of it.
{LABELS["realism"]}: could it be real? 0: no; 1: with flaws; 2: as a photograph.
{LABELS["aesthetic_quality"]}: is it good to look at? 0: no; 1: it will do; 2: it is a work of art.

Answer with three lines, each a label, a colon and its number, and nothing else."""


class WISEInquiry(Inquiry[WISE]):
    """One question an item."""

    scores: ClassVar[tuple[str, ...]] = ("correct",)
    own = Rubric("own-1", {"image": VERIFIED})
    shown = "1"
    form: ClassVar[Form] = YesNo("correct")

    def questions(self, item: Item, output: Path) -> list[Question]:
        """The output, its text and what that means."""
        text = self.rubric.text("image", instruction=instruction(item), explanation=item.extra["explanation"])
        return [self.question(item, (Shown(output, encoding=ENCODING), text), self.form)]


class WISELegacyInquiry(WISEInquiry):
    """One question an item, with three scores."""

    scores = tuple(LABELS)
    own = Rubric("own-1", {"image": LEGACY})
    form = Labelled(LABELS, 0, 2)

"""IVEBench: twenty moments of a clip before and after an edit, two numbers from 1 to 5, each asked for by itself."""

from pathlib import Path

from benchmarks.quality.inquiries.base import INSTRUCTION, Inquiry, Rubric, instruction
from benchmarks.quality.inquiries.pairs import before_after, clips
from benchmarks.quality.interface import Item
from benchmarks.quality.judging.forms import Integers
from benchmarks.quality.judging.question import Question
from benchmarks.quality.judging.showing import Encoding
from benchmarks.quality.official.ivebench import IVEBench

MOMENTS = 20
ENCODING = Encoding(long_edge=426, quality=95)
RUBRIC = f"""You see a clip before and after an edit.

The edit that was asked for: {INSTRUCTION}

{{asked}}

Answer with the number alone, from 1 to 5."""
ASKED = {
    "IS": """Is what was asked for done, all of it?
1: not at all; 2: hardly; 3: in part; 4: nearly; 5: exactly.""",
    "CF": """Is all that was not to change as before, in detail and throughout?
1: it is another clip; 2: much has changed; 3: visible changes; 4: small ones; 5: nothing changed.""",
}


class IVEBenchInquiry(Inquiry[IVEBench]):
    """Two questions an item."""

    scores = tuple(ASKED)
    own = Rubric("own-1", {name: RUBRIC.format(asked=asked) for name, asked in ASKED.items()})
    shown = "1"

    def questions(self, item: Item, output: Path) -> list[Question]:
        """Both clips, once for each score."""
        pair = before_after(*clips(self.benchmark, item, output, MOMENTS, ENCODING))
        texts = {name: self.rubric.text(name, instruction=instruction(item)) for name in self.scores}
        return [self.question(item, (*pair, texts[name]), Integers((name,), 1, 5), part=name) for name in self.scores]

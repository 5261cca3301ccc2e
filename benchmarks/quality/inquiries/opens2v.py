"""OpenS2V-Eval's natural score: sixteen frames of a clip, a number from 1 to 5, asked for three times."""

from pathlib import Path

from benchmarks.quality.inquiries.base import Inquiry, Rubric
from benchmarks.quality.interface import Item
from benchmarks.quality.judging.forms import Integers
from benchmarks.quality.judging.question import Question
from benchmarks.quality.judging.showing import Encoding, Shown
from benchmarks.quality.metrics.frames import opens2v_judged
from benchmarks.quality.official.opens2v import OpenS2V

ENCODING = Encoding(long_edge=512, quality=95)
RUBRIC = """You see frames of one clip, in order. Could it have been filmed?

Look at whether things and people make sense together; light, shadows and movement obey physics; surfaces, faces, hands
and proportions are as in life; and anything blurs, melts, flickers or turns into something else.

1: surely not; 2: hardly; 3: hard to say; 4: most likely; 5: surely.

Answer with the number alone."""


class OpenS2VInquiry(Inquiry[OpenS2V]):
    """One question an item."""

    scores = ("natural_score",)
    own = Rubric("own-1", {"clip": RUBRIC})
    shown = "1"
    repeats = 3

    def questions(self, item: Item, output: Path) -> list[Question]:
        """The output alone."""
        frames = opens2v_judged(item.expect.frames)
        rate = item.expect.fps * len(frames) / item.expect.frames
        content = (Shown(output, tuple(frames), rate, ENCODING), self.rubric.text("clip"))
        return [self.question(item, content, Integers(self.scores, 1, 5))]

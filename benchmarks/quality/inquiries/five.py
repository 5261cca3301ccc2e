"""FiVE-Acc: the benchmark's own questions about an edited clip: what it no longer shows, what it shows, a choice."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.quality.inquiries.base import Inquiry, Rubric
from benchmarks.quality.interface import Item
from benchmarks.quality.judging.forms import Form, Letter, YesNo
from benchmarks.quality.judging.judged import Judged
from benchmarks.quality.judging.question import Question
from benchmarks.quality.judging.showing import Encoding, Shown
from benchmarks.quality.metrics.frames import five_judged
from benchmarks.quality.official.five import FiVE
from benchmarks.quality.totals.five import ACCURACY, parts
from bernini.errors import DataError

ENCODING = Encoding(long_edge=None)
RATE = 10.0  # frames per second that the official script tells its model, whatever the clip's
FORMS: dict[str, tuple[str, Form]] = {
    "source_yes_no_question": ("yes_no", YesNo("source", right="no")),
    "target_yes_no_question": ("yes_no", YesNo("target")),
    "multiple_choice_question": ("choice", Letter("mc", "abcd", "b")),
}
"""Text and form of each question; the target is always choice b."""
TEXTS = {
    "yes_no": "These are frames of one clip. Answer with the word yes or the word no, and nothing else.\n<question>",
    "choice": "These are frames of one clip. Answer with the letter of the right choice, and nothing else.\n<question>",
}


class FiVEInquiry(Inquiry[FiVE]):
    """Two or three questions an item."""

    scores = ACCURACY
    own = Rubric("own-1", TEXTS)
    shown = "1"

    def questions(self, item: Item, output: Path) -> list[Question]:
        """The output alone, once for each question; not every item asks for what the source showed."""
        asked = item.extra["questions"]
        if lacking := [name for name in FORMS if name not in asked and not name.startswith("source")]:
            raise DataError(f"the item has no {lacking[0]}", where=item.id)
        clip = Shown(output, tuple(five_judged(item.expect.frames)), RATE, ENCODING)
        return [
            self.question(item, (clip, self.rubric.text(key, question=str(asked[name]))), form, part=name)
            for name, (key, form) in FORMS.items()
            if name in asked
        ]

    def settle(self, judged: Judged) -> Judged:
        """Both yes-no questions right, the choice right, one of these, both of them."""
        return judged.joined(ACCURACY, settled)


def settled(row: Mapping[str, float]) -> dict[str, float]:
    """The four parts of an item from its questions, each 1 if answered as for the target."""
    return parts(yes_no=bool(row["target"] and row.get("source", 1)), choice=bool(row["mc"]))

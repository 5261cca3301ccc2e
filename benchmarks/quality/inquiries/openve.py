"""OpenVE-Bench: a clip before and after an edit, three scores from 1 to 5.

The official judge is sent both files. Chat endpoints take pictures, so that here both are shown as the same sixteen
moments. The rubric is in our own words, and asks for the same three things as the official one.
"""

from pathlib import Path

from benchmarks.quality.inquiries.base import INSTRUCTION, Inquiry, Rubric, instruction
from benchmarks.quality.inquiries.pairs import before_after, clips
from benchmarks.quality.interface import Item
from benchmarks.quality.judging.forms import Labelled, Lines
from benchmarks.quality.judging.judged import Cap
from benchmarks.quality.judging.question import Question
from benchmarks.quality.judging.showing import Encoding
from benchmarks.quality.official.openve import OpenVE

MOMENTS = 16
ENCODING = Encoding(long_edge=512, quality=90)
LABELS = {
    "instruction_compliance": "Instruction compliance",
    "consistency": "Consistency",
    "visual_quality": "Visual quality",
}
ASKED = {
    "global_style": "The look of the whole clip is to change, and what happens in it is to stay.",
    "background_change": "The surroundings are to change, and who or what is in front of them is to stay.",
    "local_change": "One thing is to look different, and all else is to stay.",
    "local_remove": "One thing is to vanish without a trace, and what it hid is to be filled in.",
    "local_add": "One thing is to be there that was not, at the right place, in the right light and size.",
    "subtitle_edit": "Written words are to be added, changed or taken away, legibly, and the picture is to stay.",
    "creative_edit": "Something imaginative is to happen, and what it does not touch is to be recognised.",
    "camera_edit": "The camera is to move or frame otherwise, and the scene is to be the same one.",
}
"""What counts in each type of edit."""
RUBRIC = f"""You see frames of a clip, then frames of the same moments after the clip was edited. Rate the edit.

The edit that was asked for: {INSTRUCTION}
{{asked}}

Give three whole numbers from 1 to 5.
{LABELS["instruction_compliance"]}: is what was asked for done, all of it, and nothing else?
1: not at all; 3: in part; 5: exactly.
{LABELS["consistency"]}: is all that was not to change as before, in detail and from frame to frame?
1: it is another clip; 3: visible changes; 5: nothing changed.
{LABELS["visual_quality"]}: does the edited clip look real and stable?
1: broken; 3: visible flaws or flicker; 5: flawless.
No number is larger than the one for instruction compliance.

Answer with three lines, each a label, a colon and its number, and nothing else."""


class OpenVEInquiry(Inquiry[OpenVE]):
    """One question an item."""

    scores = tuple(LABELS)
    own = Rubric("own-1", {kind: RUBRIC.format(asked=asked) for kind, asked in ASKED.items()})
    shown = "1"
    cap = Cap("instruction_compliance", ("consistency", "visual_quality"))

    def questions(self, item: Item, output: Path) -> list[Question]:
        """Both clips, by the rubric of the item's type."""
        form = Labelled(LABELS, 1, 5) if self.rubric.is_own else Lines(self.scores, 1, 5)
        pair = before_after(*clips(self.benchmark, item, output, MOMENTS, ENCODING))
        system = self.rubric.text(item.category, instruction=instruction(item))
        return [self.question(item, pair, form, system=system)]

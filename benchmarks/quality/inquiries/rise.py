"""RISEBench: does an edited image show what follows, is all else as it was, and could it be real; each from 1 to 5.

What the judge is shown follows the official script: the answer as a text or as an image, which takes the source's place
in both questions that show two images.
"""

from pathlib import Path

from benchmarks.quality.inquiries.base import INSTRUCTION, Inquiry, Rubric, instruction
from benchmarks.quality.interface import Item
from benchmarks.quality.judging.forms import Labelled
from benchmarks.quality.judging.question import Question
from benchmarks.quality.judging.showing import Encoding, Shown
from benchmarks.quality.official.rise import RISE
from bernini.errors import DataError

ENCODING = Encoding(long_edge=768, quality=75)
ASKED = f"The edit that was asked for: {INSTRUCTION}\n"
LAST = "\nEnd with one line: the words Final score, a colon and a whole number from 1 to 5."
AGREES = """How well does what came of it agree with that?
1: not at all; 2: in some respect; 3: in part; 4: but for details; 5: in every detail."""
CONSISTENCY = f"""You see two images: what an edit started from, or should have led to, and what came of it.

{ASKED}
Leave aside what that changes. Is all else as before?
1: hardly anything; 2: much has changed; 3: one thing has visibly changed; 4: a detail has; 5: it is.
{LAST}"""
PLAUSIBILITY = f"""You see an image. Is it clear, and could what it shows be real?

1: it cannot be made out, or is broken; 2: bad flaws; 3: visible flaws; 4: small flaws; 5: flawless.
{LAST}"""
BY_TEXT = f"""You see an image that was edited.

{ASKED}What the edited image has to show: <reference>

{AGREES}
{LAST}"""
BESIDE = BY_TEXT.replace(
    "You see an image that was edited.", "You see two images: what an edit started from, and what came of it."
)
BY_IMAGE = f"""You see two images: how an edit should have come out, and how it did.

{ASKED}
{AGREES}
{LAST}"""
PARTS = {"consistency": CONSISTENCY, "reasoning": BY_TEXT, "plausibility": PLAUSIBILITY}
TEXTS = {
    **{f"{kind} {part}": text for kind in ("temporal", "causal", "spatial") for part, text in PARTS.items()},
    **{f"{kind} reasoning beside the source": BESIDE for kind in ("temporal", "causal", "spatial")},
    "spatial reasoning by an image": BY_IMAGE,
    "logical consistency": CONSISTENCY,
    "logical reasoning": BY_TEXT,
    "logical reasoning by an image": BY_IMAGE,
    "logical reasoning by an image alone": BY_IMAGE.replace(ASKED, ""),
}


class RISEInquiry(Inquiry[RISE]):
    """Two or three questions an item."""

    scores = ("reasoning", "consistency", "plausibility")
    own = Rubric("own-1", TEXTS)
    shown = "1"

    def questions(self, item: Item, output: Path) -> list[Question]:
        """The image before and after, or the output alone, for each score that the item gets."""
        key, answer = _reasoning(item)
        source = self.benchmark.folder / "data" / answer if answer else self.benchmark.sources(item)[1][0]
        before, after = (Shown(path, encoding=ENCODING) for path in (source, output))
        pair: tuple[str | Shown, ...] = ("First image:", before, "Second image:", after)
        asked = {
            "reasoning": (key, (after,) if key == f"{item.category} reasoning" else pair),
            "consistency": (f"{item.category} consistency", pair),
            "plausibility": (f"{item.category} plausibility", (after,)),
        }
        facts = {"instruction": instruction(item), "reference": _reference(item)}
        return [
            self.question(
                item, (*shown, self.rubric.text(text, **facts)), Labelled({score: "Final score"}, 1, 5), part=score
            )
            for score, (text, shown) in asked.items()
            if score in item.metrics
        ]


def _reasoning(item: Item) -> tuple[str, str | None]:
    """The text that asks for an item's reasoning, and the image that shows its answer, if one does."""
    told, kind = item.extra, item.category
    answer = told.get("reference_img")
    if answer and (kind == "spatial" or (kind == "logical" and "reference_txt" not in told)):
        alone = kind == "logical" and told.get("reasoning_wo_ins")
        return f"{kind} reasoning by an image{' alone' if alone else ''}", answer
    if not _reference(item):
        raise DataError("nothing says what the edit has to show", where=item.id, fix="get the official file")
    beside = kind != "logical" and "reasoning_img" in told
    return f"{kind} reasoning{' beside the source' if beside else ''}", None


def _reference(item: Item) -> str:
    """What says in words what the edit has to show; puzzles have a text of their own for it."""
    own = item.extra.get("reference_txt") if item.category == "logical" else None
    return str(own or item.extra.get("reference") or "")

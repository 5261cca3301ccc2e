"""Readers of answers take what was asked for, and nothing else."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality.judging.forms import Form, Integers, JsonIntegers, Labelled, Letter, Lines, Unreadable, YesNo
from bernini.errors import ConfigError

ONE = Integers(("quality",), 1, 5)
TWO = Integers(("success", "excess"), 0, 10)
LINES = Labelled({"ic": "Instruction Compliance", "vq": "Visual Quality & Stability"}, 1, 5)
JSON = JsonIntegers({"score": ("success", "excess"), "plausibility": ("plausibility",)}, 0, 10)
YES, NO = YesNo("sees"), YesNo("sees", right="no")
CHOICE = Letter("choice", "abcd", "b")
FORMS: list[Form] = [ONE, TWO, LINES, JSON, YES, CHOICE]

READ = [
    (ONE, "4", [4]),
    (ONE, " 4.\n", [4]),
    (ONE, "**4**", [4]),
    (ONE, '"4"', [4]),
    (ONE, "<think>3 dogs, so 5? no: 4</think>\n4", [4]),
    (TWO, "[7, 10]", [7, 10]),
    (TWO, "7,10", [7, 10]),
    (TWO, "0 3", [0, 3]),
    (TWO, "0\n3\n", [0, 3]),
    (LINES, "It shows 2 dogs.\nInstruction Compliance: 4\nVisual Quality & Stability: 5", [4, 5]),
    (LINES, "- **Instruction compliance**: 4.\n- **visual quality & stability:** 5", [4, 5]),
    (LINES, "Visual Quality & Stability: 1\n  Instruction Compliance : 2", [2, 1]),
    (JSON, '{"score": [7, 9], "plausibility": 3, "reasoning": "2 of 3 [8, 8]"}', [7, 9, 3]),
    (JSON, '```json\n{"plausibility": 0,\n "score": [0, 10]}\n```', [0, 10, 0]),
    (YES, "Yes", [1]),
    (YES, "yes, there is no doubt", [1]),
    (YES, "**No**.", [0]),
    (NO, "no\nthere is none", [1]),
    (NO, "Yes.", [0]),
    (CHOICE, "b", [1]),
    (CHOICE, "(B) a red car", [1]),
    (CHOICE, "B. a red car", [1]),
    (CHOICE, "**C**", [0]),
    (CHOICE, "a)", [0]),
]
REFUSED = [
    *((form, text) for form in FORMS for text in ("", " ", "null", "I cannot say.", "[]", "{}", "<think>4")),
    *((ONE, text) for text in ("0", "6", "-4", "3.5", "4.0", "4/5", "4 out of 5", "Score: 4", "I rate this 4", "four")),
    *((ONE, text) for text in ("4 5", "4, 4", "٤", "1" * 5000, "4\n\nBecause of 3 things", "[4]", "4%", "≈4", "4-5")),
    *((TWO, text) for text in ("7", "7, 8, 9", "7, 11", "[7, 8", "7 of 8", "7/8", "[7, 8.5]", "7; 8", "[[7, 8]]")),
    (LINES, "Instruction Compliance: 4"),
    (LINES, "Instruction Compliance: 4\nInstruction Compliance: 5\nVisual Quality & Stability: 5"),
    (LINES, "Instruction Compliance: 4 or 5\nVisual Quality & Stability: 5"),
    (LINES, "Instruction Compliance: 3.5\nVisual Quality & Stability: 5"),
    (LINES, "Instruction Compliance: 4/5\nVisual Quality & Stability: 5/5"),
    (LINES, "Instruction Compliance: 4\nVisual Quality & Stability: 6"),
    (LINES, "Instruction Compliance: 4, Visual Quality & Stability: 5"),
    *(
        (JSON, text)
        for text in (
            '{"score": [7, 9], "plausibility": 3',
            '{"score": [7, 9]}',
            '{"score": [7], "plausibility": 3}',
            '{"score": 7, "plausibility": 3}',
            '{"score": [7, 9], "plausibility": [3]}',
            '{"score": [7, 9], "plausibility": "3"}',
            '{"score": [7, 9], "plausibility": 3.0}',
            '{"score": [7, true], "plausibility": 3}',
            '{"score": [7, 9], "plausibility": NaN}',
            '{"score": [7, 11], "plausibility": 3}',
            '{"score": [7, 9], "plausibility": 3, "plausibility": 4}',
            'Here: {"score": [7, 9], "plausibility": 3}',
            '[{"score": [7, 9], "plausibility": 3}]',
            "[" * 100_000,
        )
    ),
    *((YES, text) for text in ("The answer is yes.", "yes and no", "yes/no", "yesterday", "Yes there is", "1", "true")),
    *((CHOICE, text) for text in ("e", "A car is seen", "because", "b c", "the answer is b", "(b", "ab", "1")),
]


@pytest.mark.parametrize(("form", "text", "scores"), READ)
def test_what_is_of_the_form_is_read(form: Form, text: str, scores: list[float]) -> None:
    assert form.read(text) == dict(zip(form.names, scores, strict=True))


@pytest.mark.parametrize(("form", "text"), REFUSED)
def test_anything_else_is_refused(form: Form, text: str) -> None:
    with pytest.raises(Unreadable) as caught:
        form.read(text)
    assert 0 < len(str(caught.value)) < 200


@pytest.mark.parametrize("form", FORMS)
def test_readers_are_total(form: Form) -> None:
    """Whatever comes is read or refused, and what is read is in range."""

    @given(st.text() | st.from_regex(r"[\[{*\"' ]*[-0-9., \nbBnoyesNYa:]*[\]}*\"' ]*"))
    def check(text: str) -> None:
        try:
            scores = form.read(text)
        except Unreadable:
            return
        assert tuple(scores) == form.names and all(form.low <= value <= form.high for value in scores.values())

    check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["*", " ", "\n", "1", "1 ", "[", "`", "- ", "_ ", "```\n", "<think>", "::", " \n*"])
def test_long_nonsense_is_refused_at_once(part: str, form: Form) -> None:
    start = time.monotonic()
    for begin, end in (("", ""), ("1", "x"), ("```json\n", "\n``"), ("Instruction Compliance:", "x"), ("by", "x")):
        with pytest.raises(Unreadable):
            form.read(begin + part * (130_000 // len(part)) + end)
    assert time.monotonic() - start < 2


@given(st.lists(st.integers(-3, 14), min_size=2, max_size=2))
def test_all_forms_of_numbers_agree_on_the_range(numbers: list[int]) -> None:
    texts = {
        TWO: str(numbers),
        Integers(("success", "excess"), 0, 10): "{}, {}".format(*numbers),
    }
    objects = JsonIntegers({"score": ("success", "excess")}, 0, 10)
    lines = Labelled({"success": "A", "excess": "B"}, 0, 10)
    said = [(form, text) for form, text in texts.items()]
    said += [(objects, json.dumps({"score": numbers})), (lines, "A: {}\nB: {}".format(*numbers))]
    for form, text in said:
        if all(0 <= number <= 10 for number in numbers):
            assert list(form.read(text).values()) == numbers
        else:
            with pytest.raises(Unreadable, match="is not from 0 to 10"):
                form.read(text)


@pytest.mark.parametrize(("form", "begins"), [(LINES, "nothing else:\n"), (JSON, "of the form ")])
def test_a_judge_that_fills_in_what_the_reminder_shows_is_read(form: Form, begins: str) -> None:
    shown = form.reminder.split(begins)[1].rstrip(".")
    filled = shown.replace(f"<whole number from {form.low} to {form.high}>", "3")
    assert form.read(filled) == dict.fromkeys(form.names, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Integers((), 1, 5),
        lambda: Integers(("a", "a"), 1, 5),
        lambda: Integers(("a",), 5, 5),
        lambda: Labelled({}, 1, 5),
        lambda: JsonIntegers({"x": ("a",), "y": ("a",)}, 1, 5),
        lambda: YesNo(""),
        lambda: YesNo("a", right="maybe"),
        lambda: Letter("a", "abc", "d"),
        lambda: Letter("a", "ABC", "A"),
    ],
)
def test_forms_without_a_meaning_are_refused(make: object) -> None:
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Why: it is so.\nPrompt Compliance: 5\n**Seamlessness**: **3**", {"first": 5, "second": 3}),
        ("a: 1\nb: 2.", {"first": 1, "second": 2}),
        ("a: 1\nb: 2\nc: 3", "3 lines end"),
        ("5\n4", "no lines end"),
        ("a: 5/5\nb: 4", "1 lines end"),
        ("a: 1\nb: 6", "6 is not from 1 to 5"),
        (": 1\n: 2", "no lines end"),
    ],
)
def test_lines_are_read_in_their_order(text: str, told: dict[str, float] | str) -> None:
    form = Lines(("first", "second"), 1, 5)
    if isinstance(told, dict):
        assert form.read(text) == told
    else:
        with pytest.raises(Unreadable, match=told):
            form.read(text)

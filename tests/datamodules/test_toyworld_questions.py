"""Questions about the toy world and edits that take reasoning, worked out again from their words alone."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bernini.errors import ConfigError
from bernini.tasks import TASKS, UNDERSTANDING, get_task
from bernini.text.encoder import TextEncoder
from bernini.text.prompt import renderer_text
from datamodules.toyworld import Scene, caption, held_out, items, judge, make_item, make_question, read, render
from datamodules.toyworld.data import ToyWorld, ToyWorldDataModule
from datamodules.toyworld.family import ROWS
from datamodules.toyworld.questions import QUESTIONS
from datamodules.toyworld.reasoning import REASONS
from datamodules.toyworld.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, TEXTURES

SMALL = {"frames": 1, "height": 32, "width": 32}
KINDS = [(task, kind) for task, kinds in QUESTIONS.items() for kind in kinds]
VALUES = {"colour": COLOURS, "shape": SHAPES, "texture": TEXTURES, "size": SIZES}
WORDS = {value: name for name, values in VALUES.items() for value in values}
PLURALS = {f"{shape}s": shape for shape in SHAPES} | {"crosses": "cross"}
PREDICATE = rf"(?:a )?(?:{'|'.join(WORDS)})|(?:on|at|in) the \w+|(?:stay|move)s? \w+"
CHANGE = (  # one that names its thing and its value
    r"make (the .+) (\w+)",
    r"turn (the .+) into a (\w+)",
    r"change the \w+ of (the .+) to (?:a )?(\w+)",
    r"give (the .+) a (\w+) texture",
)
BACK = {"left": "right", "right": "left", "up": "down", "down": "up"}

splits = st.sampled_from(["train", "held_out"])
quick = settings(max_examples=30)


# -- a reader of the toy world's English, which knows nothing of how it is written ---------------------------------


def centre(thing):
    x0, y0, x1, y1 = PLACES[thing.place]
    return (x0 + x1) / 2, (y0 + y1) / 2


def fits(scene, number, phrase):
    """Whether a phrase such as "the large thing" can mean that thing."""
    thing = scene.things[number]
    if match := re.fullmatch(r"the thing (left of|right of|above|below) (the .+)", phrase):
        (x, y), (x0, y0) = centre(thing), centre(scene.things[meant(scene, match[2])])
        return {"left of": x < x0, "right of": x > x0, "above": y < y0, "below": y > y0}[match[1]]
    if match := re.fullmatch(r"the (larger|smaller) thing", phrase):
        sign = 1 if match[1] == "larger" else -1
        return all(sign * (SIZES[thing.size] - SIZES[o.size]) > 0 for o in scene.things if o is not thing)
    if match := re.fullmatch(r"the thing that is not (?:a )?(\w+)", phrase):
        return getattr(thing, WORDS[match[1]]) != match[1]
    if phrase in ("the thing that stays still", "the thing that does not move"):
        return thing.motion == "still"
    if match := re.fullmatch(r"the thing that moves ?(\w*)", phrase):
        return thing.motion != "still" and match[1] in ("", thing.motion)
    if match := re.fullmatch(r"the thing (?:on|at|in) the (\w+)", phrase):
        return thing.place == match[1]
    *adjectives, noun = phrase.removeprefix("the ").split()
    return all(getattr(thing, WORDS[word]) == word for word in [*adjectives, *([noun] if noun != "thing" else [])])


def meant(scene, phrase):
    """Number of the one thing that a phrase means; there is never a choice."""
    (number,) = [number for number in range(len(scene.things)) if fits(scene, number, phrase)]
    return number


def claim(scene, subject, predicate):
    """Whether what a sentence says is so."""
    thing = scene.things[meant(scene, subject)]
    if match := re.fullmatch(r"(?:stays?|moves?) (\w+)", predicate):
        return thing.motion == match[1]
    if match := re.fullmatch(r"(?:on|at|in) the (\w+)", predicate):
        return thing.place == match[1]
    value = predicate.removeprefix("a ")
    return getattr(thing, WORDS[value]) == value


def reply(scene, text, medium):
    """The answer to a question."""
    there = rf"(?:are there|does the {medium} show)\?"
    if text in (f"describe the {medium}", f"what does the {medium} show?", f"what is in the {medium}?"):
        return caption(scene, medium == "video")
    if text in ("what is the background?", f"what background does the {medium} have?"):
        return scene.background
    if text in ("how is the light?", "is the light bright or dim?"):
        return scene.lighting
    if re.fullmatch(rf"how many things {there}", text):
        return ("none", "one", "two")[len(scene.things)]
    if re.fullmatch("how many (of the )?things move.", text):
        return ("none", "one", "two")[sum(thing.motion != "still" for thing in scene.things)]
    if match := re.fullmatch(rf"how many (\w+)(?: things)? {there}", text):
        value = PLURALS.get(match[1], match[1])
        return ("none", "one", "two")[sum(getattr(thing, WORDS[value]) == value for thing in scene.things)]
    if match := re.fullmatch(rf"(?:is there|does the {medium} show) an? (\w+) (\w+)\?", text):
        return "yes" if match.groups() in [(thing.colour, thing.shape) for thing in scene.things] else "no"
    if match := re.fullmatch(r"(?:where is|what is the place of) (the .+)\?", text):
        place = scene.things[meant(scene, match[1])].place
        return {"left": "on the left", "right": "on the right", "centre": "in the centre"}.get(place, f"at the {place}")
    if match := re.fullmatch(r"(?:what|how) does (the .+) (?:do|move)\?", text):
        motion = scene.things[meant(scene, match[1])].motion
        return "stays still" if motion == "still" else f"moves {motion}"
    if match := re.fullmatch(r"what (?:is the )?(\w+) (?:is|of) (the .+)\?", text):
        return getattr(scene.things[meant(scene, match[2])], match[1])
    if match := re.fullmatch(r"(?:which is|what is|name) (the .+?)\??", text):
        thing = scene.things[meant(scene, match[1])]
        return f"the {thing.colour} {thing.shape}"
    match = re.fullmatch(rf"(?:is it true that|is|does) (the .+?)(?: is)? ({PREDICATE})\?", text)
    return "yes" if claim(scene, *match.groups()) else "no"


def changes(scene, text):
    """What an instruction changes: (number, attribute, value) each, or the number of the thing that it removes."""
    if match := re.fullmatch(r"(?:remove everything but|keep only) (the .+)", text):
        return 1 - meant(scene, match[1])
    if match := re.fullmatch(r"(?:remove|delete) (the .+)", text):
        return meant(scene, match[1])
    if match := re.fullmatch(r"(?:make|let) (the .+) move (left|right|up|down|the other way)", text):
        number = meant(scene, match[1])
        return [(number, "motion", BACK.get(scene.things[number].motion) if " " in match[2] else match[2])]
    if match := re.fullmatch(r"(?:swap the|let the two things swap their) (\w+)s(?: of the two things)?", text):
        return [(number, match[1], getattr(scene.things[1 - number], match[1])) for number in (0, 1)]
    if match := re.fullmatch(r"give (the .+) the (\w+) of the other thing", text):
        number = meant(scene, match[1])
        return [(number, match[2], getattr(scene.things[1 - number], match[2]))]
    if match := re.fullmatch(r"make the (\w+) of (the .+) that of the other", text):
        number = meant(scene, match[2])
        return [(number, match[1], getattr(scene.things[1 - number], match[1]))]
    parts = [re.fullmatch(f"(?:{'|'.join(CHANGE)})", part) for part in re.split(r" and (?=make|turn)", text)]
    named = [[group for group in part.groups() if group] for part in parts]
    return [(meant(scene, phrase), WORDS[value], value) for phrase, value in named]


def apply(scene, change):
    """The scene after `changes`."""
    things = list(scene.things)
    if isinstance(change, int):
        del things[change]
    else:
        for number, name, value in change:
            things[number] = replace(things[number], **{name: value})
    return replace(scene, things=tuple(things))


# -- questions -------------------------------------------------------------------------------------------------------


def medium_of(item):
    return "image" if item.task == "und_img" else "video"


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_every_answer_follows_from_the_scene_and_from_the_pixels(task, kind):
    right, count = 0, 24
    for index in range(count):
        item = make_question(task, index, seed=2, frames=9, kinds=[kind], split=("train", "held_out")[index % 2])
        shown, question, answer = item.messages
        asked = item.info["question"]
        assert reply(Scene.from_json(asked["scene"]), question.text, medium_of(item)) == answer.text, question.text
        assert asked["kind"] == kind and asked["answer"] == answer.text
        assert (answer.text in asked["choices"]) != (kind == "caption")
        seen = read(shown.media.pixels).scene
        if kind == "caption":  # things are read in an order of their own
            orders = [seen, replace(seen, things=seen.things[::-1])]
            right += answer.text in [caption(scene, task == "und_vid") for scene in orders]
        else:
            right += reply(seen, question.text, medium_of(item)) == answer.text
    assert right == count


def test_questions_are_chats_without_a_visual_target():
    image, clip = (make_question(task, 3, frames=5) for task in QUESTIONS)
    for item, kind, frames, fps in ((image, "image", 1, 0), (clip, "video", 5, 16)):
        assert [(m.type, m.has_loss) for m in item.messages] == [(kind, False), ("text", False), ("text", True)]
        assert not item.targets and item.prompt == item.messages[1].text
        assert item.messages[0].media.pixels.shape == (3, frames, 64, 64) and item.messages[0].media.fps == fps


@pytest.mark.parametrize("task", QUESTIONS)
def test_every_kind_wording_and_short_answer_occurs(task):
    made = [make_question(task, index, **SMALL) for index in range(1500)]
    kinds = Counter(item.info["question"]["kind"] for item in made)
    assert set(kinds) == set(QUESTIONS[task])
    assert max(kinds.values()) < 1.6 * min(kinds.values())
    answers = {kind: Counter() for kind in kinds}
    wordings = {kind: set() for kind in kinds}
    for item in made:
        asked = item.info["question"]
        answers[asked["kind"]][asked["answer"]] += 1
        first, second, *_, last = item.prompt.split()
        wordings[asked["kind"]].add((first, last) if asked["kind"] == "count" else (first, second))
        if asked["kind"] not in ("caption", "which"):
            assert set(answers[asked["kind"]]) <= set(asked["choices"])
    assert all(len(found) > 1 for found in wordings.values())
    assert {"yes", "no"} == set(answers["whether"]) and 0.4 < answers["whether"]["yes"] / kinds["whether"] < 0.6
    for kind, values in {**VALUES, "place": PLACES, "background": BACKGROUNDS}.items():
        assert len(answers[kind]) == len(values)
    assert len(answers["count"]) == 3 and len(answers["light"]) == 2 and len(answers["which"]) > 30
    assert task == "und_img" or len(answers["motion"]) == 5


@quick
@given(st.sampled_from(sorted(QUESTIONS)), st.integers(0, 10**6), st.integers(0, 100), splits, st.integers(32, 70))
def test_questions_are_pure_and_keep_the_splits_apart(task, index, seed, split, width):
    one = make_question(task, index, seed=seed, split=split, frames=3, width=width)
    make_question(task, index + 1)
    two = make_question(task, index, seed=seed, split=split, frames=3, width=width)
    assert one.info == two.info and one.key == two.key and one.to_row() == two.to_row()
    assert torch.equal(one.messages[0].media.pixels, two.messages[0].media.pixels)
    assert one.info == make_question(task, index, seed=seed, split=split, **SMALL).info
    assert json.loads(json.dumps(one.info)) == one.info
    scene = Scene.from_json(one.info["question"]["scene"])
    assert any(map(held_out, scene.things)) == (split == "held_out")
    assert task == "und_vid" or all(thing.motion == "still" for thing in scene.things)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "und_txt"}, "no questions for task 'und_txt'"),
        ({"task": "und_img", "kinds": ["motion"]}, "do not fit task und_img"),
        ({"task": "und_img", "kinds": []}, "do not fit task und_img"),
        ({"index": -1}, "no sample -1"),
        ({"split": "test"}, "split 'test'"),
        ({"frames": 0}, "0 frame"),
    ],
)
def test_bad_arguments_of_questions_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_question(**{"task": "und_vid", "index": 0, **arguments})


@pytest.mark.parametrize("task", UNDERSTANDING)
def test_whoever_makes_images_and_clips_refuses_questions(task):
    with pytest.raises(ConfigError, match=f"task '{task}' makes no image or clip") as caught:
        get_task(task)
    assert "planner" in caught.value.why and "t2v" in caught.value.fix
    if task in QUESTIONS:
        with pytest.raises(ConfigError, match="makes no image or clip"):
            make_question(task, 0, **SMALL).check()


# -- mixes -----------------------------------------------------------------------------------------------------------


def test_questions_are_mixed_with_tasks_in_their_parts():
    world = ToyWorld({"v2v": 2.0, "und_img": 1.0, "und_vid": 1.0}, **SMALL, seed=4, edits=["recolour"])
    drawn = [world[index] for index in range(80)]
    assert Counter(item.task for item in drawn) == pytest.approx({"v2v": 40, "und_img": 20, "und_vid": 20}, abs=2)
    for index, item in enumerate(drawn):
        if item.task == "v2v":
            assert item.info == make_item("v2v", index, seed=4, edits=["recolour"], **SMALL).info
        else:
            assert item.info == make_question(item.task, index, seed=4, **SMALL).info


def test_the_data_module_asks_in_training_and_validation():
    module = ToyWorldDataModule(["und_vid", "t2i"], batch_size=8, length=16, val_length=8, **{**SMALL, "frames": 5})
    for loader, split in ((module.train_dataloader(), "train"), (module.val_dataloader(), "held_out")):
        asked = [item for batch in loader for item in batch.samples if item.task == "und_vid"]
        assert asked
        for item in asked:
            scene = Scene.from_json(item.info["question"]["scene"])
            assert any(map(held_out, scene.things)) == (split == "held_out")
            assert torch.equal(item.messages[0].media.pixels, render(scene, 5, 32, 32))


def test_older_samples_stay_as_they_were():
    found = hashlib.sha256()
    world = ToyWorld({"t2v": 2.0, "v2v": 3.0, "i2i": 1.0, "mv2v": 1.5}, frames=1, height=32, width=32, seed=5)
    drawn = [item for split in ("train", "held_out") for item in items(list(TASKS), 120, seed=3, split=split, **SMALL)]
    drawn += [world[index] for index in range(60)]
    drawn += [make_item("v2v", index, edits=["statue", "recolour"], **SMALL) for index in range(10)]
    for item in drawn:
        found.update(json.dumps([item.key, item.info], sort_keys=True).encode())
    assert found.hexdigest()[:16] == "ed47c522c5d369b4"  # benchmarks' figures and encoded samples depend on it


# -- reasoning edits -------------------------------------------------------------------------------------------------


def reasoning(task, count, **options):
    for index in range(count):
        yield make_item(task, index, edits=["reason"], split=("train", "held_out")[index % 2], **options)


def scenes(item):
    truth = item.info["truth"]
    return Scene.from_json(truth["sources"][0]), Scene.from_json(truth["target"])


@pytest.mark.parametrize("task", ["v2v", "i2i"])
def test_an_instruction_and_its_explicit_form_lead_to_the_target(task):
    kinds = Counter()
    for item in reasoning(task, 300, **SMALL):
        source, target = scenes(item)
        truth = item.info["truth"]
        assert truth["edit"] == "reason"
        kinds[truth["reason"]] += 1
        for text in (item.prompt, item.info["explicit"]):
            assert apply(source, changes(source, text)) == target, text
        assert item.prompt != item.info["explicit"]
        names = re.findall(rf"the (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})", item.info["explicit"])
        assert len(names) == (2 if truth["reason"] == "swap" else 1)
    assert set(kinds) == set(REASONS) - ({"motion", "reverse"} if task == "i2i" else set())
    assert min(kinds.values()) > 15


@pytest.mark.parametrize("task", ["v2v", "i2i"])
def test_only_the_right_thing_gets_full_marks(task):
    mistakes = 0
    for item in reasoning(task, 40, frames=9):
        source, target = scenes(item)
        made, given = item.targets[0].media.pixels, item.sources[0].media.pixels
        scores = judge(item, made)
        assert scores == dict.fromkeys(scores, 1.0) and {"edit_done", "rest_unchanged"} <= set(scores)
        unedited = judge(item, given)
        assert unedited["edit_done"] == 0 and unedited["rest_unchanged"] == 1, item.prompt

        change = changes(source, item.info["explicit"])
        wrong = 1 - change if isinstance(change, int) else [(1 - number, *rest) for number, *rest in change]
        confused = apply(source, wrong)
        if confused not in (source, target):
            mistakes += 1
            assert judge(item, render(confused, made.shape[1]))["edit_done"] == 0, item.prompt
    assert mistakes > 20


def test_the_words_of_reasoning_fit_the_renderers_context():
    tokenizer = TextEncoder.from_pretrained("assets/toy").tokenizer
    texts = [
        renderer_text(task, text)
        for task in ("v2v", "i2i")
        for item in reasoning(task, 60, **SMALL)
        for text in (item.prompt, item.info["explicit"])
    ]
    assert max(len(ids) for ids in tokenizer(texts).input_ids) < ROWS


def test_reasoning_is_only_asked_for_by_name():
    made = list(items(["v2v", "i2i"], 200, **SMALL))
    assert not any(item.info["truth"]["edit"] == "reason" or "explicit" in item.info for item in made)
    with pytest.raises(ConfigError, match="do not fit task mv2v"):
        make_item("mv2v", 0, edits=["reason"])


# -- reasoning itself ------------------------------------------------------------------------------------------------


def is_sound(scene, why):
    """Whether all that a reason states is so, and what it says to follow does."""
    facts, _, follows = why.partition(", so ")
    if match := re.fullmatch("there are (the .+) and (the .+)", facts):
        names = match.groups()
        return {meant(scene, name) for name in names} == {0, 1} and follows in [f"{name} goes" for name in names]
    clauses = [
        re.fullmatch(rf"(the \w+ \w+)(?: is)? ({PREDICATE})", clause).groups() for clause in facts.split(" and ")
    ]
    if match := re.fullmatch(r"the other way is (\w+)", follows):
        followed = BACK[match[1]] == clauses[0][1].split()[-1]
    else:
        followed = not follows or len({meant(scene, phrase) for phrase in follows.split(" is the ")}) == 1
    return followed and all(claim(scene, *clause) for clause in clauses)


@pytest.mark.parametrize("task", ["v2v", "i2i"])
def test_reasoning_is_true_of_the_pixels_and_ends_in_the_explicit_edit(task):
    kinds = set()
    for index in range(60):
        item = make_item(task, index, edits=["cot"], frames=9, split=("train", "held_out")[index % 2])
        source, instruction, thought, target = item.messages
        assert (thought.type, thought.has_loss) == ("cot_text", True) and target.is_target
        kinds.add(item.info["truth"]["reason"])
        seen = read(source.media.pixels).scene
        why, explicit = thought.text.split("\n\n")
        assert explicit == item.info["explicit"]
        assert is_sound(seen, why.removesuffix(".")), thought.text
        named = re.findall(r"(?:^|and |are )(the \w+ \w+)", why.partition(", so ")[0])  # in an order that is seen
        places = [seen.things[meant(seen, name)].place for name in named]
        assert len(places) == 1 or places in (["left", "right"], ["top", "bottom"])
        assert apply(seen, changes(seen, explicit)) == apply(seen, changes(seen, instruction.text)) != seen
        plain = make_item(task, index, edits=["reason"], frames=9, split=("train", "held_out")[index % 2])
        assert plain.info == item.info and [m.text for m in plain.messages] == [None, instruction.text, None]
        assert torch.equal(plain.targets[0].media.pixels, target.media.pixels)
    assert kinds == set(REASONS) - ({"motion", "reverse"} if task == "i2i" else set())


def test_reasoning_is_mixed_in_by_its_part():
    world = ToyWorld({"v2v/cot": 1.0, "i2i/cot": 1.0, "v2v": 8.0}, **SMALL)
    drawn = [world[index] for index in range(100)]
    thinking = Counter(item.task for item in drawn if any(m.type == "cot_text" for m in item.messages))
    assert thinking == pytest.approx({"v2v": 10, "i2i": 10}, abs=2)
    with pytest.raises(ConfigError, match="do not fit task mv2v"):
        make_item("mv2v", 0, edits=["cot"])

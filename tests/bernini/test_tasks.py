"""The task table, as the released system has it."""

import pytest

from bernini.errors import ConfigError
from bernini.flow.guidance import MODES
from bernini.tasks import DEFAULT_SENTENCE, TASKS, get_task

HELPER = "You are a helpful assistant"
SENTENCES = {
    "t2i": f"{HELPER} specialized in text-to-image generation.",
    "t2v": f"{HELPER} specialized in text-to-video generation.",
    "i2i": f"{HELPER} specialized in image editing.",
    "r2i": f"{HELPER} specialized in subject-to-image generation.",
    "i2v": f"{HELPER} specialized in image-to-video generation.",
    "v2v": f"{HELPER} specialized in video editing.",
    "r2v": f"{HELPER} specialized in subject-to-video generation.",
    "vi2v": f"{HELPER} specialized in video editing on content propagation.",
    "rv2v": f"{HELPER} specialized in video editing with reference.",
    "ads2v": f"{HELPER} specialized in ads insertion.",
    "vrc2v": f"{HELPER} for editing. You may need to adjust the subject's action or position.",
    "mv2v": f"{HELPER} for editing. You might need to adjust the video's style, lighting, colors, textures, and the "
    "subject's pose or action.",
}
SHIFTS = {"t2i": 3, "t2v": 3, "i2i": 4, "r2i": 4, "r2v": 4, "i2v": 5, "v2v": 5, "vi2v": 5, "rv2v": 5, "vrc2v": 5}
SHIFTS |= {"mv2v": 5, "ads2v": 5}
IMAGE_TASKS = {"t2i", "i2i", "r2i"}


def test_there_are_twelve_tasks():
    assert set(TASKS) == set(SENTENCES) == set(SHIFTS) and len(TASKS) == 12
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences_are_the_checkpoints(name):
    assert get_task(name).sentence == SENTENCES[name]
    known = name in {"t2i", "t2v", "i2i", "v2v", "r2v", "rv2v"}
    assert get_task(name).planner_sentence == (SENTENCES[name] if known else "You are a helpful assistant.")
    assert DEFAULT_SENTENCE == "You are a helpful assistant."


@pytest.mark.parametrize("name", SHIFTS)
def test_timesteps_are_drawn_as_released(name):
    task = get_task(name)
    assert task.shift == SHIFTS[name]
    assert task.target == ("image" if name in IMAGE_TASKS else "video")
    assert task.density == ("logit_normal" if name in IMAGE_TASKS else "mode")


@pytest.mark.parametrize("name", TASKS)
def test_guidance_modes_exist_and_fit_the_sources(name):
    task = get_task(name)
    arms = {arm.sources for term in MODES[task.guidance].terms for arm in (term.arm, term.base)}
    assert ("first_video" in arms) <= bool(task.videos[0])
    assert ("images" in arms) <= bool(task.images[0])
    assert (arms == {"none"}) == (task.videos == task.images == (0, 0))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("t2i", "t2v_apg"), ("t2v", "t2v_apg"), ("i2i", "v2v"), ("r2v", "r2v_apg"), ("rv2v", "rv2v")),
        *(("v2v", "v2v_apg"), ("mv2v", "v2v_apg"), ("ads2v", "v2v_apg")),
    ],
)
def test_default_guidance_is_the_released_preset(name, mode):
    assert get_task(name).guidance == mode


def test_names_are_forgiving_and_aliased():
    assert get_task("vr2v") is get_task("RV2V") is TASKS["rv2v"]


def test_unknown_tasks_are_refused_with_a_hint():
    with pytest.raises(ConfigError, match="unknown task 'v2vv'") as caught:
        get_task("v2vv")
    assert "v2v" in caught.value.fix and "ads2v" in caught.value.why

"""Scenes as labels."""

import pytest

from bernini.tasks import TASKS
from datamodules.toyworld import Scene, Thing, make_item
from datamodules.toyworld.labels import ANSWERS, SLOTS, scene_labels
from datamodules.toyworld.scene import CORNER, PLACES

LOOKS = ("shape", "colour", "texture", "size")


def answers(truth, moving=True):
    """Labels in words, without those that do not apply."""
    labels = scene_labels(truth, moving)
    assert len(labels) == len(SLOTS)
    return {slot: ANSWERS[slot][label] for slot, label in zip(ANSWERS, labels, strict=True) if label >= 0}


def test_a_scene_in_words() -> None:
    scene = Scene((Thing("ring", "cyan", "striped", "large", "up", "left"),), "beige", "dim")
    assert answers({"target": scene.to_json()}) == {
        "background": "beige",
        "lighting": "dim",
        **{f"{place}.thing": "yes" if place == "left" else "no" for place in (*PLACES, CORNER)},
        "left.shape": "ring",
        "left.colour": "cyan",
        "left.texture": "striped",
        "left.size": "large",
        "left.motion": "up",
    }


@pytest.mark.parametrize("task", TASKS)
def test_labels_say_what_the_target_shows(task) -> None:
    for index in range(20):
        truth = make_item(task, index, frames=1, height=32, width=32).info["truth"]
        scene = Scene.from_json(truth["target"])
        said = answers(truth)
        assert {slot.split(".")[0] for slot, answer in said.items() if answer == "yes"} == {
            thing.place for thing in scene.things
        }
        for thing in scene.things:
            assert all(said[f"{thing.place}.{name}"] == getattr(thing, name) for name in (*LOOKS, "motion"))
        assert (said["background"], said["lighting"]) == (scene.background, scene.lighting)
        assert len(said) == 2 + 6 + 5 * len(scene.things)
        still = answers(truth, moving=False)
        assert still == {slot: answer for slot, answer in said.items() if not slot.endswith(".motion")}


def test_every_answer_has_a_number() -> None:
    assert {name: SLOTS[name] for name in ("corner.thing", "top.colour", "centre.motion", "background")} == {
        "corner.thing": 2,
        "top.colour": 8,
        "centre.motion": 5,
        "background": 4,
    }
    assert len(SLOTS) == 6 * 6 + 2

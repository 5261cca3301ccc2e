"""The toy world makes what it says, and its verifier reads what is there."""

import re
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bernini.errors import ConfigError, DataError
from bernini.tasks import TASKS
from datamodules.toyworld import EDITS, Scene, Thing, caption, held_out, items, judge, make_item, read, render
from datamodules.toyworld.edits import CHANGES, draw_scene, edit
from datamodules.toyworld.scene import BACKGROUNDS, COLOURS, MOTIONS, SHAPES

FACTS = ("shape", "colour", "texture", "size", "place", "motion")
quick = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])


def scenes_of(item):
    """Every message with pixels, and the scene that it shows."""
    truth = item.info["truth"]
    visuals = [m for m in item.messages if m.media is not None]
    return zip(visuals, map(Scene.from_json, [*truth["sources"], truth["target"]]), strict=True)


def facts(scene, image=False):
    """Attributes of a scene by place; an image does not show motion, nor a moving thing in the middle of its way."""
    found = {"background": scene.background, "lighting": scene.lighting, "count": len(scene.things)}
    for thing in scene.things:
        found |= {(thing.place, name): getattr(thing, name) for name in FACTS if not (image and name == "motion")}
    return found


def score(clips, spoil=lambda pixels: pixels):
    """Share of facts that are read right, and their number, over (message, scene) pairs."""
    right = total = 0
    for message, scene in clips:
        if message.is_image and any(thing.motion != "still" for thing in scene.things):
            continue
        truth, seen = facts(scene, message.is_image), facts(read(spoil(message.media.pixels)).scene, message.is_image)
        right += sum(seen.get(key) == value for key, value in truth.items())
        total += len(truth)
    return right / total, total


def sample(count, **options):
    """Items of all tasks, seeds and both splits."""
    for index in range(count):
        for task in TASKS:
            split = "held_out" if index % 4 == 0 else "train"
            yield make_item(task, index, seed=index % 3, split=split, **options)


def random_scene(seed, **options):
    """A scene with unambiguous names."""
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng, **options)
    while len({thing.name for thing in scene.things}) < len(scene.things):
        scene = draw_scene(rng, **options)
    return scene, rng


def test_true_clips_are_read_right():
    clips = [pair for item in sample(40, frames=16) for pair in scenes_of(item)]
    assert len(clips) >= 1000
    share, total = score(clips)
    assert total > 8000 and share >= 0.995


@pytest.mark.parametrize("kind", CHANGES)
def test_one_changed_attribute_is_found_and_nothing_else(kind):
    found = exact = 0
    pairs = 25
    for seed in range(pairs):
        scene, rng = random_scene(seed, **({"counts": (1,)} if kind == "move" else {}))
        target, _ = edit(kind, scene, rng)
        before, after = facts(read(render(scene)).scene), facts(read(render(target)).scene)
        if kind == "move":  # facts are keyed by place
            (old,), (new,) = scene.things, target.things
            before = {
                (new.place if key[0] == old.place else key[0], *key[1:]) if isinstance(key, tuple) else key: value
                for key, value in before.items()
            }
        changed = {
            key[1] if isinstance(key, tuple) else key
            for key in before.keys() | after.keys()
            if before.get(key) != after.get(key)
        }
        found += CHANGES[kind].attribute in changed
        exact += changed == {CHANGES[kind].attribute}
    assert found >= 0.99 * pairs
    assert exact >= 0.99 * pairs


def blur(pixels):
    """Gaussian blur of 0.7 pixels."""
    taps = torch.exp(-0.5 * (torch.arange(-3, 4) / 0.7) ** 2)
    kernel = (taps[:, None] * taps / taps.sum() ** 2).expand(3, 1, 7, 7)
    frames = torch.nn.functional.pad(pixels.float().transpose(0, 1), (3, 3, 3, 3), mode="replicate")
    return torch.nn.functional.conv2d(frames, kernel, groups=3).transpose(0, 1)


def test_blurred_noisy_shifted_clips_are_still_read():
    generator = torch.Generator().manual_seed(0)

    def spoil(pixels):
        noise = torch.randint(-10, 11, pixels.shape, generator=generator)
        tint = torch.tensor([8.0, -8.0, 4.0])[:, None, None, None]
        return (blur(pixels) + noise + tint).clamp(0, 255).to(torch.uint8)

    clips = [pair for item in sample(4, frames=9) for pair in scenes_of(item)]
    assert score(clips, spoil)[0] >= 0.99


@pytest.mark.parametrize(
    ("height", "width", "frames", "least"),
    [(48, 48, 9, 0.99), (32, 32, 9, 0.97), (48, 80, 5, 0.99), (128, 96, 2, 0.99), (64, 64, 1, 0.99)],
)
def test_other_sizes_and_lengths_are_read(height, width, frames, least):
    clips = [pair for item in sample(4, height=height, width=width, frames=frames) for pair in scenes_of(item)]
    if frames == 1:  # nothing moves in one frame
        clips = [(m, s) for m, s in clips if m.is_image]
    assert all(m.media.pixels.shape == (3, 1 if m.is_image else frames, height, width) for m, _ in clips)
    assert score(clips)[0] >= least


def test_reading_floats_and_an_empty_clip():
    pixels = render(Scene((Thing("cross", "cyan", "striped", "large", "up", "left"),), "beige"))
    assert read(pixels / 127.5 - 1).scene == read(pixels).scene
    empty = read(render(Scene((), "pink-to-lilac"), 3))
    assert empty.scene == Scene((), "pink-to-lilac") and empty.tracks == ()
    with pytest.raises(DataError, match=r"\[3, T, H, W\]"):
        read(torch.zeros(1, 3, 9, 64, 64))
    with pytest.raises(DataError, match="not finite"):
        read(torch.full((3, 1, 64, 64), torch.nan))


@quick
@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 4), st.integers(32, 90), st.integers(32, 90))
def test_any_pixels_can_be_read_and_judged(seed, level, frames, height, width):
    generator = torch.Generator().manual_seed(seed)
    junk = torch.randn(3, frames, height, width, generator=generator) * level
    assert len(read(junk).scene.things) <= 4
    assert all(0 <= value <= 1 for value in judge(make_item("mv2v", seed, frames=1), junk).values())


def test_tracks_follow_the_thing():
    reading = read(render(Scene((Thing("circle", "red", "plain", "small", "right", "top"),)), 9, 64, 96))
    x, y = reading.tracks[0].T
    assert np.allclose(np.diff(x), 32 / 8 / 96, atol=0.004) and np.allclose(y, 0.25, atol=0.01)
    assert reading.fits[0] > 0.98


@pytest.mark.parametrize("task", TASKS)
def test_the_target_gets_full_marks_and_the_source_none_for_the_edit(task):
    for index in range(6):
        item = make_item(task, index, seed=5)
        target, spec = item.targets[0].media.pixels, item.spec
        scores = judge(item, target)
        assert scores == dict.fromkeys(scores, 1.0), item.prompt
        assert ("motion" in scores) == (spec.target == "video")
        assert ("edit_done" in scores) == ("rest_unchanged" in scores) == (task in EDITS)
        assert ("identity" in scores) == bool(item.info["truth"]["references"])
        if task in EDITS:
            unedited = judge(item, item.sources[0].media.pixels)
            assert unedited["edit_done"] == 0 and unedited["rest_unchanged"] == 1, item.prompt


def test_damage_beside_the_edit_is_seen():
    item = make_item("v2v", 1, edits=["recolour"])
    target = Scene.from_json(item.info["truth"]["target"])
    backdrop = next(name for name in BACKGROUNDS if name != target.background)
    scores = judge(item, render(replace(target, background=backdrop)))
    slots = 2 + 6 * len(target.things)
    assert scores["edit_done"] == 1
    assert scores["rest_unchanged"] == pytest.approx((slots - 2) / (slots - 1))
    assert judge(item, render(replace(target, things=())))["edit_done"] == 0

    item = next(i for i in items(["v2v"], 50, edits=["remove"]) if len(i.info["truth"]["target"]["things"]) == 1)
    source, target = (
        Scene.from_json(scene) for scene in (item.info["truth"]["sources"][0], item.info["truth"]["target"])
    )
    (gone,) = set(source.things) - set(target.things)
    assert judge(item, render(replace(target, things=(gone,))))["edit_done"] == 0, "the wrong one was removed"
    assert judge(item, render(replace(target, things=())))["edit_done"] == 1, "and here both"

    item = next(i for i in items(["t2v"], 50) if len(i.info["truth"]["target"]["things"]) == 1)
    target = Scene.from_json(item.info["truth"]["target"])
    crowd = Scene(
        (Thing("cross", "red", "plain", "small", place="left"), Thing("ring", "cyan", "plain", "large", place="right"))
    )
    assert judge(item, render(target))["attributes"] == 1
    assert judge(item, render(crowd))["motion"] <= 0.5


def test_an_item_without_truth_is_refused():
    item = make_item("t2i", 0)
    item.info.clear()
    with pytest.raises(DataError, match="no truth"):
        judge(item, item.targets[0].media.pixels)


tasks = st.sampled_from(sorted(TASKS))
splits = st.sampled_from(["train", "held_out"])


@quick
@given(
    tasks,
    st.integers(0, 10**6),
    st.integers(0, 100),
    splits,
    st.integers(1, 6),
    st.integers(32, 70),
    st.integers(32, 70),
)
def test_items_are_pure_and_valid(task, index, seed, split, frames, height, width):
    options = {"seed": seed, "split": split, "frames": frames, "height": height, "width": width}
    one = make_item(task, index, **options)
    make_item("t2v", index + 1)
    two = make_item(task, index, **options)
    assert one.info == two.info and one.key == two.key and one.to_row() == two.to_row()
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(one.media(), two.media(), strict=True))
    assert one.info["truth"] == make_item(task, index, seed=seed, split=split, frames=2).info["truth"]

    one.check()
    assert "." not in one.key and one.prompt == one.info["truth"]["instruction"]
    order = [
        0 if m.is_video and not m.is_target else 1 if m.is_image and not m.is_target else 2 if m.text else 3
        for m in one.messages
    ]
    assert order == sorted(order) and order[-2:] == [2, 3]
    for message in (m for m in one.messages if m.media):
        assert message.media.pixels.shape == (3, 1 if message.is_image else frames, height, width)
        assert message.media.pixels.dtype == torch.uint8 and message.media.fps == (0 if message.is_image else 16)


@quick
@given(tasks, st.integers(0, 10**6))
def test_held_out_combinations_stay_apart(task, index):
    for message, scene in scenes_of(make_item(task, index, frames=1)):
        assert not any(map(held_out, scene.things)), message.type
    *_, (message, target) = scenes_of(make_item(task, index, frames=1, split="held_out"))
    assert message.is_target and any(map(held_out, target.things))


def test_about_a_seventh_is_held_out_of_every_motion():
    combinations = [Thing(s, c, "plain", "small", m) for s in SHAPES for c in COLOURS for m in MOTIONS]
    assert 0.1 < np.mean(list(map(held_out, combinations))) < 0.2
    for motion in MOTIONS:
        assert {held_out(t) for t in combinations if t.motion == motion} == {True, False}


@quick
@given(st.integers(0, 10**6), st.integers(32, 200), st.integers(32, 200), st.integers(1, 5))
def test_things_never_meet_nor_touch_the_border(seed, height, width, frames):
    scene, _ = random_scene(seed)
    rest = render(replace(scene, things=()), frames, height, width)
    marks = [(render(replace(scene, things=(t,)), frames, height, width) != rest).any(0).any(0) for t in scene.things]
    assert (torch.stack(marks).sum(0) <= 1).all()
    for mark in marks:
        assert mark.any() and not (mark[0].any() or mark[-1].any() or mark[:, 0].any() or mark[:, -1].any())


def test_motion_goes_its_way_at_any_length():
    for motion, (dx, dy) in MOTIONS.items():
        scene = Scene((Thing("square", "white", "plain", "small", motion),))
        for frames in (2, 9, 33):
            ends = render(scene, frames)[0, [0, -1]] > 128
            rows, columns = (ends.any(axis).float().argmax(-1) for axis in (2, 1))
            assert (columns[1] - columns[0], rows[1] - rows[0]) == (32 * dx, 32 * dy)


def test_an_image_is_the_first_frame_of_its_clip():
    item = make_item("i2v", 3)
    assert torch.equal(item.sources[0].media.pixels, item.targets[0].media.pixels[:, :1])
    item = make_item("vi2v", 3)
    assert torch.equal(item.sources[1].media.pixels, item.targets[0].media.pixels[:, :1])


def test_captions():
    ring = Thing("ring", "blue", "plain", "small", "still", "bottom")
    circle = Thing("circle", "red", "striped", "large", "right", "top")
    assert caption(Scene((circle, ring), "gray", "dim")) == (
        "a large red striped circle at the top moves right and a small blue ring at the bottom stays still, "
        "on a gray background in dim light"
    )
    assert caption(Scene((ring,)), moving=False) == "a small blue ring at the bottom, on a black background"


@pytest.mark.parametrize("task", ["r2i", "r2v", "ads2v"])
def test_references_are_not_described(task):
    for index in range(10):
        item = make_item(task, index, frames=1)
        truth = item.info["truth"]
        things = [truth["target"]["things"][number] for number in truth["references"]]
        assert things and not set(item.prompt.split()) & {thing["shape"] for thing in things}
        assert not set(item.prompt.split()) & {thing["colour"] for thing in things}


@pytest.mark.parametrize("kind", sorted({kind for kinds in EDITS.values() for kind in kinds}))
def test_edits_change_one_fact(kind):
    task = next(task for task in ("mv2v", "vrc2v", "rv2v", "ads2v") if kind in EDITS[task])
    for index in range(8):
        item = make_item(task, index, frames=1, edits=[kind])
        truth = item.info["truth"]
        assert truth["edit"] == kind
        source, target = (Scene.from_json(row) for row in (truth["sources"][0], truth["target"]))
        if kind in ("add", "insert", "remove"):
            more, fewer = (source, target) if kind == "remove" else (target, source)
            assert len(more.things) == len(fewer.things) + 1 and set(fewer.things) < set(more.things)
            continue
        rows = [{"background": s.background, "lighting": s.lighting} for s in (source, target)]
        for row, scene in zip(rows, (source, target), strict=True):
            row |= {(i, k): v for i, thing in enumerate(scene.things) for k, v in asdict(thing).items()}
        changed = {key if isinstance(key, str) else key[1] for key in rows[0] if rows[0][key] != rows[1][key]}
        assert changed and changed <= (
            {"shape", "colour", "texture"} if kind == "replace" else {CHANGES[kind].attribute}
        )


def test_a_mix_keeps_its_parts_and_order():
    mix = [item.key for item in items({"v2v": 3, "t2i": 1}, 20, frames=1)]
    assert sum(key.startswith("v2v") for key in mix) == 15 and len(set(mix)) == 20
    assert mix[:7] == [item.key for item in islice(items({"v2v": 3, "t2i": 1}, 100, frames=1), 7)]
    assert {item.task for item in items(list(TASKS), 12, frames=1)} == set(TASKS)
    for item in items(["v2v", "t2v"], 10, frames=1, edits=["recolour", "remove"]):
        assert item.info["truth"]["edit"] in (None, "recolour", "remove")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "v3v"}, "unknown task"),
        ({"edits": ["motion"]}, "do not fit task v2v"),
        ({"edits": ["recolor", "recolour"]}, "do not fit task v2v"),
        ({"edits": []}, "do not fit task v2v"),
        ({"split": "test"}, "split 'test'"),
        ({"index": -1}, "no sample -1"),
        ({"frames": 0}, "0 frame"),
        ({"width": 31}, "64 x 31"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_item(**{"task": "v2v", "index": 0, **arguments})


@pytest.mark.parametrize("mix", [{}, {"v2v": 0}, {"v2v": 2, "t2v": -1}])
def test_bad_mixes_are_refused(mix):
    with pytest.raises(ConfigError, match="no mix"):
        next(items(mix, 1))


# -- references and unseen edits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["r2i", "r2v"])
@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_as_many_reference_images_as_asked_for(task: str, count: int) -> None:
    for index in range(8):
        item = make_item(task, index, frames=5, references=count)
        assert len(item.sources) == count
        named = [int(number) for number in re.findall(r"image(\d+)", item.prompt)]
        truth = item.info["truth"]
        assert len(named) == len(truth["references"]) == len(truth["target"]["things"]) <= count
        shown = [scene["things"][0] for scene in truth["sources"]]
        assert len({(thing["colour"], thing["shape"]) for thing in shown}) == count  # no two look alike
        for number, thing in zip(named, truth["target"]["things"], strict=True):
            assert all(shown[number][key] == thing[key] for key in ("shape", "colour", "texture", "size"))


def test_by_default_there_are_one_to_five_references_in_any_order() -> None:
    made = [make_item("r2v", index, frames=1) for index in range(120)]
    assert {len(item.sources) for item in made} == {1, 2, 3, 4, 5}
    first = [int(re.findall(r"image(\d+)", item.prompt)[0]) for item in made if len(item.sources) == 4]
    assert set(first) == {0, 1, 2, 3}  # nothing but its number says which image is meant


def test_a_number_of_references_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 reference images"):
        make_item("r2v", 0, references=0)


def test_a_statue_is_golden_plain_and_still() -> None:
    for index in range(12):
        item = make_item("v2v", index, frames=9, edits=["statue"], split="held_out")
        truth = item.info["truth"]
        (name,) = re.findall(r"turn the (\w+ \w+) into a golden statue", item.prompt)
        pairs = list(zip(truth["sources"][0]["things"], truth["target"]["things"], strict=True))
        changed = [new for old, new in pairs if old != new]
        assert len(changed) == 1
        assert [changed[0][k] for k in ("colour", "texture", "motion")] == ["yellow", "plain", "still"]
        assert [f"{old['colour']} {old['shape']}" for old, new in pairs if old != new] == [name]
        assert judge(item, item.targets[0].media.pixels)["edit_done"] == 1
        assert judge(item, item.sources[0].media.pixels)["edit_done"] == 0


def test_the_family_never_sees_a_statue() -> None:
    made = items(list(TASKS), 600, frames=1, height=32, width=32)
    assert not any("statue" in item.prompt for item in made)

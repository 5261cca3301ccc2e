"""Totals of each benchmark on records whose figures are known by other means."""

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality.published.tables import published
from benchmarks.quality.totals import (
    bernini_bench,
    dpg,
    editverse,
    five,
    gedit,
    geneval,
    imgedit,
    ivebench,
    kris,
    opens2v,
    openve,
    rise,
    vbench,
    vbench2,
    vbench_i2v,
    wise,
)
from benchmarks.quality.totals.records import Facts, Range, Totals, mean
from bernini.errors import DataError

Case = tuple[dict[str, dict[str, float | None]], dict[str, Facts]]


def case(kinds: dict[str, tuple[str, ...]], ranges: dict[str, Range], each: int = 2, seed: int = 0) -> Case:
    """Random records of ``each`` items of every category, which have its scores."""
    draw = random.Random(seed)
    records: dict[str, dict[str, float | None]] = {}
    facts = {}
    for kind, names in kinds.items():
        for number in range(each):
            one = f"{kind}-{number}"
            records[one] = {
                name: draw.uniform(max(ranges[name].low, -10), min(ranges[name].high, 10)) for name in names
            }
            facts[one] = Facts(names, kind, frames=number + 2)
    return records, facts


def same(categories: Any, ranges: dict[str, Range]) -> Case:
    return case(dict.fromkeys(categories, tuple(ranges)), ranges)


def dimensions(names: Any) -> Case:
    return case({name: (name,) for name in names}, vbench.RANGES | dict.fromkeys(names, Range(0, 1)))


JUDGED = Range(1, 5)
ACC: Case = (
    {kind: dict(yn=1.0, mc=0.0, union=1.0, inter=0.0) for kind in five.TYPES},
    {kind: Facts(five.ACCURACY, kind) for kind in five.TYPES},
)
RISE_SCORES = ("consistency", "reasoning", "plausibility")
KRIS = [name for groups in kris.GROUPS.values() for names in groups.values() for name in names]
ALL: dict[str, tuple[Callable[..., Totals], Case]] = {
    "vbench": (vbench.totals, dimensions(vbench.DIMENSIONS)),
    "vbench_i2v": (vbench_i2v.totals, dimensions(vbench_i2v.DIMENSIONS)),
    "vbench2": (vbench2.totals, dimensions(vbench2.DIMENSIONS)),
    "opens2v": (opens2v.totals, same(["any"], opens2v.RANGES)),
    "openve": (openve.totals, same(openve.EIGHT, dict.fromkeys(openve.SCORES, JUDGED))),
    "editverse": (editverse.totals, same(["any"], editverse.RANGES)),
    "five": (five.conventional, same(five.TYPES, five.CONVENTIONAL)),
    "five_acc": (five.accuracies, ACC),
    "ivebench": (ivebench.totals, same(["any"], ivebench.RANGES)),
    "bernini_bench": (
        partial(bernini_bench.totals, task="rv2v"),
        same(bernini_bench.CATEGORIES, dict.fromkeys(bernini_bench.SCORES["rv2v"], JUDGED)),
    ),
    "gedit": (gedit.totals, same(gedit.GROUPS, dict.fromkeys(gedit.SCORES, Range(0, 10)))),
    "imgedit": (imgedit.totals, same(imgedit.TYPES, dict.fromkeys(imgedit.SCORES, JUDGED))),
    "geneval": (geneval.totals, same(geneval.TASKS, {"correct": Range(0, 1)})),
    "dpg": (dpg.totals, same(["any"], {"score": Range(0, 1)})),
    "wise": (wise.totals, same(wise.CATEGORIES, {"correct": Range(0, 1)})),
    "wise_legacy": (wise.legacy, same(wise.CATEGORIES, dict.fromkeys(wise.JUDGED, Range(0, 2)))),
    "rise": (
        rise.totals,
        case(
            dict.fromkeys(rise.CATEGORIES, RISE_SCORES) | {"logical": RISE_SCORES[:2]},
            dict.fromkeys(RISE_SCORES, JUDGED),
        ),
    ),
    "kris": (kris.totals, case({kind: kris.asked(kind) for kind in KRIS}, dict.fromkeys(kris.SCORES, JUDGED))),
}
every = pytest.mark.parametrize("name", ALL)


# -- what all have in common --------------------------------------------------------------------------------------


@every
def test_totals_do_not_depend_on_the_order_of_items(name: str) -> None:
    totals, (records, facts) = ALL[name]
    mixed = random.Random(1).sample(sorted(records), len(records))
    shuffled = totals({one: dict(reversed(records[one].items())) for one in mixed}, {one: facts[one] for one in mixed})
    assert shuffled == totals(records, facts)
    assert all(math.isfinite(figure.value) and figure.n > 0 for figure in shuffled.values())


@every
def test_ragged_records_are_refused_by_item_and_score(name: str) -> None:
    totals, (records, facts) = ALL[name]
    one = sorted(records)[-1]
    score = facts[one].scores[-1]
    short = {key: value for key, value in records[one].items() if key != score}
    for wrong, told in (
        (short, "is missing"),
        (short | {"invented": 1.0}, "missing|unknown"),
        (records[one] | {"invented": 1.0}, "unknown"),
        (records[one] | {score: math.nan}, "is nan"),
    ):
        with pytest.raises(DataError, match=told) as caught:
            totals(records | {one: wrong}, facts)
        assert one in str(caught.value) and (score in str(caught.value) or "invented" in str(caught.value))
    with pytest.raises(DataError, match="is missing"):
        totals({key: value for key, value in records.items() if key != one}, facts)
    with pytest.raises(DataError, match="'stranger'"):
        totals(records | {"stranger": records[one]}, facts)


KINDS = [name for name, (_, (_, facts)) in ALL.items() if len({fact.category for fact in facts.values()}) > 1]


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("bernini_bench", "kris")])
def test_a_category_without_items_is_refused_where_each_weighs_alike(name: str) -> None:
    totals, (records, facts) = ALL[name]
    kind = min(fact.category for fact in facts.values())
    kept = {one: fact for one, fact in facts.items() if fact.category != kind}
    with pytest.raises(DataError, match="no item"):
        totals({one: records[one] for one in kept}, kept)


@pytest.mark.parametrize("name", [name for name in KINDS if "vbench" not in name])
def test_an_unknown_category_is_refused(name: str) -> None:
    totals, (records, facts) = ALL[name]
    with pytest.raises(DataError, match="'unheard'"):
        totals(records, {one: fact._replace(category="unheard") for one, fact in facts.items()})


@pytest.mark.parametrize("name", [name for name in ALL if "vbench" not in name and name != "rise"])
def test_items_that_are_not_asked_for_all_they_need_are_refused(name: str) -> None:
    totals, (records, facts) = ALL[name]
    one, score = sorted(records)[0], facts[sorted(records)[0]].scores[0]
    fewer = {key: value for key, value in records[one].items() if key != score}
    with pytest.raises(DataError, match=f"'{one}' is not asked for '?{score}"):
        totals(records | {one: fewer}, facts | {one: facts[one]._replace(scores=facts[one].scores[1:])})


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.randoms())
@settings(max_examples=50)
def test_a_mean_is_one_figure_in_any_order(values: list[float], order: random.Random) -> None:
    found = mean(values, "values")
    assert found == mean(order.sample(values, len(values)), "values")
    assert found.value == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-6)


# -- VBench -------------------------------------------------------------------------------------------------------


def test_vbench_gives_the_published_totals_from_records() -> None:
    (table,) = (t for t in published() if t.title == "VBench 1.0, LinGen")
    for row in table.rows.values():
        figures = {name: row[name] / 100 for name in vbench.DIMENSIONS}  # type: ignore[operator]
        records = {f"{name}-{i}": {name: value} for name, value in figures.items() for i in range(3)}
        facts = {one: Facts(tuple(record), frames=5) for one, record in records.items()}
        found = vbench.totals(records, facts)
        for name in ("total", "quality", "semantic"):
            assert 100 * found[name].value == pytest.approx(row[name], abs=0.015)
        assert found["total"].n == 3


def test_vbench_reductions_are_two_figures_of_two_names() -> None:
    records, facts = dimensions(vbench.DIMENSIONS)
    for number in range(2):
        records[f"subject_consistency-{number}"] = {"subject_consistency": (0.5, 0.8)[number]}
        records[f"background_consistency-{number}"] = {"background_consistency": (0.5, 0.8)[number]}
        records[f"appearance_style-{number}"] = {"appearance_style": (0.1, 0.2)[number]}
    single = vbench.totals(records, facts)
    assert single["subject_consistency"].value == pytest.approx((0.5 * 1 + 0.8 * 2) / 3)  # 2 and 3 frames
    assert single["appearance_style"].value == pytest.approx((0.1 * 2 + 0.2 * 3) / 5)
    with pytest.raises(DataError, match="appearance_style_last_frame"):
        vbench.totals(records, facts, reduction="multi_process")
    for number in range(2):
        one = f"appearance_style-{number}"
        records[one][vbench.LAST_FRAME] = (0.05, 0.15)[number]
        facts[one] = facts[one]._replace(scores=("appearance_style", vbench.LAST_FRAME))
    several = vbench.totals(records, facts, reduction="multi_process")
    assert several["subject_consistency"].value == pytest.approx(0.65)
    assert several["background_consistency"] == single["background_consistency"]
    assert several["appearance_style"].value == pytest.approx(0.1)


def test_vbench_has_to_know_how_many_frames_a_mean_is_over() -> None:
    records, facts = dimensions(vbench.DIMENSIONS)
    facts["subject_consistency-1"] = Facts(("subject_consistency",))
    with pytest.raises(DataError, match="'subject_consistency-1' counts for nothing"):
        vbench.totals(records, facts)


def test_vbench_counts_a_missing_dimension_as_0_only_where_told_to() -> None:
    records, facts = dimensions(vbench.DIMENSIONS)
    kept = {one: fact for one, fact in facts.items() if "scene" not in fact.scores}
    with pytest.raises(DataError, match="no item has scene"):
        vbench.totals({one: records[one] for one in kept}, kept)
    official = vbench.totals({one: records[one] for one in kept}, kept, official_missing_zero=True)
    whole = vbench.totals(records, facts)
    lost = whole["scene"].value / 0.8222 / 9
    assert official["semantic"].value == pytest.approx(whole["semantic"].value - lost)
    assert official["total"].value == pytest.approx(whole["total"].value - lost / 5) and official["total"].n == 0


def test_vbench_drops_videos_without_the_coloured_object() -> None:
    records, facts = dimensions(vbench.DIMENSIONS)
    records["color-0"] = {"color": None}
    found = vbench.totals(records, facts)["color"]
    assert found == (records["color-1"]["color"], 1)
    with pytest.raises(DataError, match="'scene' of item 'scene-0' is none"):
        vbench.totals(records | {"scene-0": {"scene": None}}, facts)


def test_vbench_i2v_and_2_follow_their_weights() -> None:
    def constant(module: Any, **values: float) -> Totals:
        records = {name: {name: values.get(name, 0.5)} for name in module.DIMENSIONS}
        return module.totals(records, {name: Facts((name,), frames=9) for name in records})

    even, more = constant(vbench_i2v), constant(vbench_i2v, camera_motion=1.0)
    assert more["i2v"].value - even["i2v"].value == pytest.approx(0.5 * 0.1 / 2.1)
    assert more["total"].value - even["total"].value == pytest.approx(0.5 * 0.1 / 2.1 / 2)
    more = constant(vbench_i2v, dynamic_degree=1.0)
    assert more["total"].value - even["total"].value == pytest.approx(0.5 * 0.5 / 5.5 / 2)
    assert constant(vbench2)["total"].value == pytest.approx(0.5)
    shares = {"diversity": 1 / 10, "camera_motion": 1 / 35, "human_clothes": 1 / 15, "thermotics": 1 / 20}
    for name, share in shares.items():
        assert constant(vbench2, **{name: 1.0})["total"].value == pytest.approx(0.5 + 0.5 * share)


# -- video benchmarks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "title", [t.title for t in published() if t.benchmark.startswith("opens2v") and "-D" in t.title]
)
def test_opens2v_gives_the_published_totals_from_records(title: str) -> None:
    (table,) = (t for t in published() if t.title == title)
    _, version, domain = table.benchmark.split()
    known = {"SkyReels-A2-P14B", "EchoVideo"}  # whose printed totals do not follow from their parts
    for model, row in table.rows.items():
        records: dict[str, dict[str, float | None]] = {"a": {}, "b": {}}
        names = opens2v.WEIGHTS[version, domain]  # type: ignore[index]
        for name in names:
            low, high = opens2v.LIMITS[name]
            low = max(low, 0)
            for one in records:
                records[one][name] = low + row[name] / 100 * (high - low)  # type: ignore[operator]
        facts = {one: Facts(tuple(names)) for one in records}
        found = opens2v.totals(records, facts, version=version, domain=domain)  # type: ignore[arg-type]
        if model not in known:
            assert found["total"].value == pytest.approx(row["total"], abs=0.0101)
        assert found["gme_score"].value == pytest.approx(row["gme_score"])


def test_opens2v_clips_items_before_the_mean_and_leaves_undetected_ones_out() -> None:
    records, facts = same(["any"], opens2v.RANGES)
    records["any-0"] |= {"aesthetics": 9.0, "motion_amplitude": 3.0, "nexus_score": 0.0, "face_sim": None}
    records["any-1"] |= {"aesthetics": 4.0, "motion_amplitude": 0.5, "nexus_score": 0.02, "face_sim": -0.5}
    found = opens2v.totals(records, facts)
    assert found["aesthetics"].value == pytest.approx(50) and found["motion_amplitude"].value == pytest.approx(75)
    assert found["nexus_score"] == (pytest.approx(40), 1) and found["face_sim"] == (pytest.approx(-50), 1)


def test_openve_types_are_part_of_the_name() -> None:
    records, facts = same(openve.EIGHT, dict.fromkeys(openve.SCORES, JUDGED))
    for types, column in ((openve.FIVE, "5 types"), (openve.SIX[::-1], "6 types"), (openve.EIGHT, "8 types")):
        found = openve.totals(records, facts, types=types)
        scores = [sum(records[f"{kind}-{i}"].values()) / 3 for kind in types for i in range(2)]  # type: ignore[arg-type]
        assert found[f"overall ({column})"] == (pytest.approx(sum(scores) / len(scores)), 2)
        assert set(found) == {f"overall ({column})", *types}
    odd = openve.totals(records, facts, types=("local_add", "creative_edit"))
    assert next(iter(odd)) == "overall (creative_edit, local_add)"


def test_what_official_scripts_drop_is_dropped_only_by_that_name() -> None:
    records, facts = same(openve.EIGHT, dict.fromkeys(openve.SCORES, JUDGED))
    del records["local_add-1"]
    found = openve.totals(records, facts, official_missing_dropped=True)
    assert found["local_add"] == (pytest.approx(mean(list(records["local_add-0"].values()), "").value), 1)  # type: ignore[arg-type]
    records["style-0"] = {"first": 1.0}
    with pytest.raises(DataError, match="'style-0'"):
        openve.totals(records, facts, official_missing_dropped=True)


def test_five_averages_types_whatever_their_sizes_and_refuses_shifted_columns() -> None:
    sizes = dict(zip(five.TYPES, (100, 100, 100, 100, 9, 10), strict=True))
    facts = {f"{kind}/{i}": Facts(five.ACCURACY, kind) for kind, size in sizes.items() for i in range(size)}
    draw = random.Random(0)
    records: dict[str, dict[str, float | None]] = {
        one: dict(five.accuracy(draw.choice(["no", "Yes."]), draw.choice(["Yes", "no"]), draw.choice(["a", "B)"])))
        for one in facts
    }
    found = five.accuracies(records, facts)
    figures = {name: figure.value for name, figure in found.items()}
    assert found["five_acc"].n == 419
    assert figures["union"] + figures["inter"] == pytest.approx(figures["yn"] + figures["mc"])
    assert figures["five_acc"] == pytest.approx((figures["yn"] + figures["mc"]) / 2)
    by_type = [[records[one]["yn"] for one, fact in facts.items() if fact.category == kind] for kind in five.TYPES]
    assert figures["yn"] == pytest.approx(100 * sum(sum(v) / len(v) for v in by_type) / 6)  # type: ignore[arg-type]
    # a cell before them was skipped, so that each column holds the next one's figure: motion, yn, mc, union
    shifted = records | {"color/9": {"yn": 1.0, "mc": 1.0, "union": 0.0, "inter": 1.0}}
    with pytest.raises(DataError, match="'color/9' contradict"):
        five.accuracies(shifted, facts)


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        (("No", "Yes, it is", "b) Red"), (1, 1, 1, 1)),
        (("Yes", "Yes", "B"), (0, 1, 1, 0)),
        ((None, "yes", "a) b"), (1, 0, 1, 0)),
        (("no", "No", "c"), (0, 0, 0, 0)),
    ],
)
def test_five_answers(answers: tuple[str | None, str, str], right: tuple[int, ...]) -> None:
    assert tuple(five.accuracy(*answers).values()) == right


def test_five_leaves_out_what_a_mask_makes_undefined() -> None:
    records, facts = same(five.TYPES, five.CONVENTIONAL)
    for kind in five.TYPES:
        records[f"{kind}-0"] |= {"psnr_unedit_part": None, "mse_unedit_part": 0.002}
        records[f"{kind}-1"] |= {"psnr_unedit_part": 30.0, "mse_unedit_part": 0.004}
    found = five.conventional(records, facts)
    assert found["psnr"] == (pytest.approx(30), 6) and found["mse_e4"] == (pytest.approx(30), 12)


def test_ivebench_gives_the_published_groups_from_records() -> None:
    (table,) = (t for t in published() if t.title == "IVEBench, short subset")
    for row in table.rows.values():
        records = {one: {name: row[name] for name in ivebench.RANGES} for one in "ab"}
        facts = {one: Facts(tuple(ivebench.RANGES)) for one in records}
        found = ivebench.totals(records, facts)
        for name in ("total", *ivebench.GROUPS):
            assert found[name].value == pytest.approx(row[name], abs=0.0125)
    records["a"]["MF"] = -1.0
    official = ivebench.totals(records, facts, official_missing_dropped=True)
    assert official["MF"] == (records["b"]["MF"], 1)


def test_editverse_prints_consistencies_in_per_cent() -> None:
    records, facts = same(["any"], editverse.RANGES)
    found = editverse.totals(records, facts)
    for name in editverse.RANGES:
        figure = (records["any-0"][name] + records["any-1"][name]) / 2  # type: ignore[operator]
        assert found[name].value == pytest.approx(figure * (100 if name.endswith("_tc") else 1))


def test_bernini_bench_has_22_kinds_and_no_average_of_its_own() -> None:
    assert len(bernini_bench.CATEGORIES) == len(set(bernini_bench.CATEGORIES)) == 22
    scores = bernini_bench.SCORES["v2v"]
    facts = {kind: Facts(scores, kind) for kind in ("add", "remove", "focus")}
    records = {
        kind: dict(zip(scores, row, strict=True))
        for kind, row in zip(facts, ((1, 5, 5, 5), (3, 1, 1, 1), (5, 2, 2, 2)), strict=True)
    }
    found = bernini_bench.totals(records, facts)
    assert found["v2v_OS"] == (3, 3) and found["v2v_OS (subject)"] == (2, 2) and found["v2v_IF (camera)"] == (2, 1)
    assert "v2v_OS (style)" not in found


# -- image benchmarks ---------------------------------------------------------------------------------------------


def test_gedit_takes_the_root_of_each_item_before_the_mean() -> None:
    records = {
        f"{g}-{i}": dict(zip(gedit.SCORES, ((9, 4, 8, 9), (0, 10, 5, 5))[i], strict=True))
        for g in gedit.GROUPS
        for i in range(2)
    }
    found = gedit.totals(records, {one: Facts(gedit.SCORES, one[:-2]) for one in records})
    assert found["G_SC"].value == pytest.approx(2) and found["G_PQ"].value == pytest.approx(6.5)
    assert found["G_O"].value == pytest.approx(math.sqrt(4 * 8) / 2)


def test_imgedit_rounds_twice() -> None:
    records = {f"{kind}-{i}": dict.fromkeys(imgedit.SCORES, 3.0) for kind in imgedit.TYPES for i in range(3)}
    records["add-0"]["first"] = 4.0  # 3.33, so that add is (3.33 + 3 + 3) / 3 = 3.11
    records["add-1"] = {"first": 4.0, "second": 4.0, "third": 3.0}  # 3.67, so that add is 3.3333 -> 3.33
    found = imgedit.totals(records, {one: Facts(imgedit.SCORES, one[:-2]) for one in records})
    assert found["add"].value == 3.33
    assert found["overall"].value == pytest.approx((3.33 + 8 * 3) / 9, abs=1e-12)


def test_dpg_zeroes_what_depends_on_a_failed_parent() -> None:
    parents = {1: [0], 2: [1], 3: [2], 4: [0]}
    assert dpg.item([{1: False, 2: True, 3: True, 4: True}], parents) == 0.25
    assert dpg.item([{1: True, 2: False, 3: True, 4: True}, {1: True, 2: True, 3: True, 4: True}], parents) == 0.75
    with pytest.raises(DataError, match="question 3 depends on question 7"):
        dpg.item([{1: True, 3: True}], {1: [0], 3: [7]})
    with pytest.raises(DataError, match="question 2"):
        dpg.item([{1: True}], {1: [0], 2: [1]})
    kinds = {"x": {1: "entity - whole", 2: "attribute - color"}, "y": {1: "entity - part"}}
    found = dpg.official_categories({"x": {1: True, 2: False}, "y": {1: False}}, kinds)
    assert found["entity"] == (50, 2) and found["entity - whole"] == (100, 1) and found["attribute"] == (0, 1)


def test_wise_weighs_culture_and_its_older_form_weighs_consistency() -> None:
    facts = {name: Facts(("correct",), name) for name in wise.CATEGORIES}
    right = {name: {"correct": float(name in ("culture", "time"))} for name in facts}
    assert wise.totals(right, facts)["overall"].value == pytest.approx(0.52)
    facts = {name: Facts(wise.JUDGED, name) for name in wise.CATEGORIES}
    judged = {name: dict(zip(wise.JUDGED, (2, 0, 1) if name == "time" else (0, 0, 0), strict=True)) for name in facts}
    assert wise.legacy(judged, facts)["overall (legacy)"].value == pytest.approx(0.75 * 0.167)


def rise_case(**scores: tuple[float, ...]) -> Case:
    records, facts = {}, {}
    for kind in rise.CATEGORIES:
        names = RISE_SCORES[:2] if kind == "logical" else RISE_SCORES
        row = scores.get(kind, (5, 5, 5))
        if row[0] == 0:
            names, row = names[1:], row[1:]
        records[kind] = dict(zip(names, row, strict=False))
        facts[kind] = Facts(names, kind)
    return records, facts


def test_rise_scores_and_solved_items() -> None:
    records, facts = rise_case(temporal=(5, 1, 5), causal=(4, 5, 3), logical=(5, 1))
    found = rise.totals(records, facts)
    assert found["score (temporal)"].value == pytest.approx(25 * ((1.5 + 0.5 + 1) / 2 - 1))
    assert found["score (causal)"].value == pytest.approx(25 * (1.2 + 2.5 + 0.6 - 1))
    assert found["score (logical)"].value == pytest.approx(25 * ((1.5 + 0.7) / 2 - 1))
    assert found["accuracy"] == (25, 4) and found["accuracy (spatial)"] == (100, 1)
    records, facts = rise_case(temporal=(1, 1, 1))
    assert rise.totals(records, facts)["score (temporal)"].value == 0


def test_rise_items_have_the_scores_of_their_category() -> None:
    records, facts = rise_case()
    for kind, names in (("logical", RISE_SCORES), ("logical", ("reasoning",)), ("causal", ("reasoning",))):
        wrong = facts | {kind: Facts(names, kind)}
        with pytest.raises(DataError, match=f"'{kind}' is not asked for"):
            rise.totals(records | {kind: dict.fromkeys(names, 5.0)}, wrong)


def test_rise_items_free_of_consistency_officially_free_the_rest() -> None:
    records, facts = rise_case(temporal=(0, 5, 5), causal=(1, 5, 5))
    found, official = rise.totals(records, facts), rise.totals(records, facts, official_free=True)
    assert found["accuracy (temporal)"].value == 100 and official["accuracy (temporal)"].value == 0
    assert found["score (temporal)"].value == official["score (temporal)"].value == pytest.approx(100)
    assert found["score (causal)"].value == pytest.approx(25 * (0.3 + 2.5 + 1 - 1))
    assert official["score (causal)"].value == pytest.approx(100)
    assert official["accuracy (causal)"] == found["accuracy (causal)"]


def test_kris_takes_knowledge_only_where_it_is_asked_for() -> None:
    assert len(KRIS) == 20 and len(kris.KNOWLEDGE) == 10
    facts = {kind: Facts(kris.asked(kind), kind) for kind in KRIS}
    records = {kind: dict(zip(kris.SCORES, (1, 3, 5, 5), strict=False)) for kind in KRIS}
    records = {kind: {name: row[name] for name in facts[kind].scores} for kind, row in records.items()}
    found = kris.totals(records, facts)
    assert found["factual"] == (pytest.approx(50), 8) and found["conceptual"] == (pytest.approx(62.5), 8)
    assert found["procedural"] == (pytest.approx(56.25), 4) and found["knowledge"] == (100, 10)
    assert found["overall"].value == pytest.approx(56.25)

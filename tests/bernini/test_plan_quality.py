"""Plan quality: the metrics against their definitions, over batches and ranks; the probe; pictures."""

import json
import multiprocessing
import socket
from itertools import combinations
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity, normalize
from torchmetrics import R2Score

from bernini.errors import DataError
from bernini.planner.picture import plan_picture, token_patches
from bernini.planner.probe import Probe, ProbeAccuracy
from bernini.planner.quality import PlanCosine, PlanExplainedVariance, PlanRetrieval
from bernini.planner.vision import VisionConfig, prepare

WIDTH = 6
IMAGE, CLIP = (1, 2, 2), (2, 2, 1)  # as many tokens each


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plans(count=12, noise=1.0, seed=0):
    """Plans, true embeddings ``[count, 4, WIDTH]`` far from 0, and grids, two of them in turn."""
    true = 5 + randn(count, 4, WIDTH, seed=seed)
    return true + noise * randn(count, 4, WIDTH, seed=seed + 1), true, [(IMAGE, CLIP)[i % 3 == 2] for i in range(count)]


def everything(planned, true, grids, parts=((0, None),), metrics=None):
    """Values of all metrics of plans that come in parts."""
    cosine, variance, retrieval = metrics or (PlanCosine(), PlanExplainedVariance(WIDTH), PlanRetrieval(gallery=4))
    for start, end in parts:
        rows = planned[start:end].flatten(0, 1), true[start:end].flatten(0, 1)
        cosine.update(*rows)
        variance.update(*rows)
        retrieval.update(*rows, grids[start:end])
    return {"cosine": cosine.compute(), "variance": variance.compute(), **retrieval.compute()}


def values(found):
    return {name: pytest.approx(value.item(), abs=1e-5) for name, value in found.items()}


# -- against the true embeddings ----------------------------------------------------------------------------------


def test_cosine_and_explained_variance_are_what_they_say() -> None:
    planned, true, grids = plans()
    found = everything(planned, true, grids)
    rows, truth = planned.flatten(0, 1), true.flatten(0, 1)
    torch.testing.assert_close(found["cosine"], cosine_similarity(rows, truth, dim=1).mean())
    r2 = R2Score(multioutput="variance_weighted").set_dtype(torch.float64)
    assert found["variance"].item() == pytest.approx(r2(rows.double(), truth.double()).item(), abs=1e-5)


def test_the_mean_everywhere_explains_nothing_however_far_it_is_from_zero() -> None:
    true = 1000 + randn(4000, WIDTH)
    metric = PlanExplainedVariance(WIDTH)
    for part in true.split(100):
        metric.update(true.mean(0).expand_as(part), part)
    assert metric.compute().item() == pytest.approx(0, abs=1e-4)
    # `forward` gives a batch's value and goes on counting.
    again = PlanExplainedVariance(WIDTH)
    batches = [again(part + 0.5, part).item() for part in true.split(1000)]
    assert batches == pytest.approx([0.75] * 4, abs=0.02)
    assert again.compute().item() == pytest.approx(1 - 0.25 / true.var(0, correction=0).mean().item(), abs=1e-4)


def recall_by_hand(planned, true, grids, gallery, k):
    """Mean over all plans and all galleries that can be drawn of the plan's grid."""
    found = []
    for grid in set(grids):
        rows = [i for i, other in enumerate(grids) if other == grid]
        mean = true[rows].mean(0)
        scores = cosine_similarity((planned[rows] - mean).flatten(1)[:, None], (true[rows] - mean).flatten(1), dim=2)
        for own in range(len(rows)):
            others = [i for i in range(len(rows)) if i != own]
            drawn = list(combinations(others, min(gallery, len(rows)) - 1))
            hits = [sum(bool(scores[own, i] >= scores[own, own]) for i in some) < k for some in drawn]
            found.append(sum(hits) / len(hits))
    return sum(found) / len(found)


@settings(max_examples=15)
@given(count=st.integers(1, 12), gallery=st.integers(1, 6), k=st.integers(1, 5), seed=st.integers(0, 99))
def test_retrieval_is_the_mean_over_all_galleries(count, gallery, k, seed) -> None:
    planned, true, grids = plans(count, noise=1.5, seed=seed)
    metric = PlanRetrieval(gallery, ranks=(1, k))
    metric.update(planned.flatten(0, 1), true.flatten(0, 1), grids)
    found = metric.compute()
    for rank in (1, k):
        expected = recall_by_hand(planned, true, grids, gallery, rank)
        assert found[f"retrieval@{rank}"].item() == pytest.approx(expected, abs=1e-5)
    sizes = [min(gallery, grids.count(grid)) for grid in grids]
    assert found["gallery"].item() == pytest.approx(sum(sizes) / len(sizes))


def test_perfect_plans_are_perfect_and_plans_of_others_are_chance() -> None:
    _, true, grids = plans(300)
    perfect = everything(true, true, grids)
    assert values(perfect) == {"cosine": 1, "variance": 1, "retrieval@1": 1, "retrieval@5": 1, "gallery": 4}
    metric = PlanRetrieval(gallery=50)
    metric.update(true.roll(3, 0).flatten(0, 1), true.flatten(0, 1), grids)
    found = metric.compute()
    assert found["retrieval@1"].item() == pytest.approx(1 / 50, abs=0.015)
    assert found["retrieval@5"].item() == pytest.approx(5 / 50, abs=0.02)


def test_the_same_plan_for_all_and_broken_plans_find_nothing() -> None:
    _, true, _ = plans(8)
    grids = [IMAGE] * 8
    for planned in (true.mean(0).expand_as(true), torch.full_like(true, torch.nan)):
        found = everything(planned, true, grids)
        assert found["retrieval@1"].item() == 0
    assert found["cosine"].isnan() and found["variance"].isnan()


def test_nothing_measured_is_not_a_number() -> None:
    found = everything(*plans(0))
    assert all(value.isnan() for value in found.values())


def test_batches_add_up() -> None:
    data = plans()
    parts = [(0, 1), (1, 1), (1, 6), (6, 12)]
    assert values(everything(*data)) == everything(*data, parts)


def test_bfloat16_as_default_does_not_spoil_the_sums() -> None:
    data = plans(200)
    torch.set_default_dtype(torch.bfloat16)
    try:
        metrics = PlanCosine(), PlanExplainedVariance(WIDTH), PlanRetrieval(gallery=4)
        found = everything(*data, metrics=metrics)
        assert metrics[2].dtype == torch.float32  # what an empty rank gathers
    finally:
        torch.set_default_dtype(torch.float32)
    assert values(everything(*data)) == found


def test_what_does_not_fit_is_an_error() -> None:
    planned, true, grids = (part[:2] for part in plans())
    with pytest.raises(DataError, match=r"\(8, 5\) cannot be compared"):
        PlanCosine().update(planned.flatten(0, 1)[:, :5], true.flatten(0, 1))
    with pytest.raises(DataError, match=r"\[n, 7\]"):
        PlanExplainedVariance(7).update(planned.flatten(0, 1), true.flatten(0, 1))
    with pytest.raises(DataError, match="8 tokens for grids of 12"):
        PlanRetrieval().update(planned.flatten(0, 1), true.flatten(0, 1), [*grids, CLIP])


# -- the probe ----------------------------------------------------------------------------------------------------

SLOTS = {"left": 4, "right": 3, "both": 2}


def coded(count, seed):
    """Embeddings ``[count, 3, 16]`` that hold what is on the left, on the right and in both, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.stack([torch.randint(size, (count,), generator=generator) for size in SLOTS.values()], 1)
    codes = [randn(size, 16, seed=9 + i) for i, size in enumerate(SLOTS.values())]
    left, right, both = (code[labels[:, i]] for i, code in enumerate(codes))
    embeds = torch.stack([left + both, right + both, torch.zeros_like(both)], 1)
    labels[labels[:, 0] == 3, 1] = -1  # a question that does not always arise
    return 3 + embeds + 0.2 * randn(count, 3, 16, seed=seed), labels


@pytest.fixture(scope="module")
def probe():
    with torch.inference_mode():  # as in Lightning's validation
        return Probe.fit(*coded(800, 0), SLOTS, hidden=16, steps=200)


def test_probe_reads_a_linear_code_and_nothing_from_noise(probe) -> None:
    embeds, labels = coded(600, 1)
    found = probe.accuracy(embeds, labels)
    assert found.keys() == {*SLOTS, "overall"} and min(found.values()) > 0.95
    assert found["overall"] == pytest.approx(sum(found[name] for name in SLOTS) / 3)
    noise = probe.accuracy(embeds.mean() + embeds.std() * randn(*embeds.shape, seed=5), labels)
    assert all(noise[name] == pytest.approx(1 / size, abs=0.09) for name, size in SLOTS.items())
    wild = probe.read(100 * randn(600, 3, 16, seed=6))
    assert (wild.amax(0) == torch.tensor(list(SLOTS.values())) - 1).all() and wild.min() == 0
    broken = probe.accuracy(torch.full_like(embeds, torch.nan), labels)
    assert broken["overall"] == 0


def test_probe_is_a_function_of_its_arguments(probe) -> None:
    data = coded(800, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.randn(3)
        again = Probe.fit(*data, SLOTS, hidden=16, steps=200)
    for a, b in zip(probe.net.parameters(), again.net.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    assert not torch.equal(Probe.fit(*data, SLOTS, hidden=16, steps=1, seed=1).net[0].bias, probe.net[0].bias)


def test_slots_without_labels_are_left_out(probe) -> None:
    embeds, labels = coded(50, 2)
    labels[:, 1] = -1
    found = probe.accuracy(embeds, labels)
    assert found.keys() == {"left", "both", "overall"} and found["overall"] > 0.95


def test_probe_accuracy_adds_up_and_is_relative_to_true_embeddings(probe) -> None:
    true, labels = coded(90, 3)
    true = true + randn(*true.shape, seed=8)  # so that the probe errs
    planned = torch.where((torch.arange(90) < 30)[:, None, None], true, true.roll(1, 0))
    metric = ProbeAccuracy(len(SLOTS))
    for rows in (slice(0, 10), slice(10, 90)):
        metric.update(probe, planned[rows], true[rows], labels[rows])
    of_plans, of_true = probe.accuracy(planned, labels)["overall"], probe.accuracy(true, labels)["overall"]
    assert 0.4 < of_plans < of_true < 1
    expected = {"probe": of_plans, "probe_true": of_true, "probe_relative": of_plans / of_true}
    assert values(metric.compute()) == expected


def test_probe_refuses_what_it_cannot_read(probe) -> None:
    embeds, labels = coded(4, 0)
    with pytest.raises(DataError, match="3 tokens of 16 values"):
        probe.accuracy(embeds[:, :2], labels)
    with pytest.raises(DataError, match="for 3 slots"):
        probe.accuracy(embeds, labels[:, :2])
    with pytest.raises(DataError, match="a label that its slot does not have"):
        Probe.fit(embeds, labels + 3, SLOTS)


# -- over ranks ---------------------------------------------------------------------------------------------------


def _rank(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    # First both ranks have samples, then one of them has none.
    found = [everything(*plans(), parts) for parts in ([[(0, 2), (2, 5)], [(5, 12)]][rank], [[(0, 12)], []][rank])]
    Path(f"{out}-{rank}").write_text(json.dumps([{k: v.item() for k, v in one.items()} for one in found]))
    torch.distributed.destroy_process_group()


def test_ranks_add_up(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks = [context.Process(target=_rank, args=(rank, port, str(tmp_path / "found"))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    alone = values(everything(*plans()))
    for rank in range(2):
        assert json.loads((tmp_path / f"found-{rank}").read_text()) == [alone, alone]


# -- pictures -----------------------------------------------------------------------------------------------------

VISION = VisionConfig(patch=4, merge=2, min_pixels=64, max_pixels=32 * 32, fps=8.0)


def clip(seed=0):
    """A clip of 24x32 noise that is not resized, and what the tower gets of it."""
    pixels = torch.randint(0, 256, (3, 6, 24, 32), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    return pixels, prepare(pixels, True, 8.0, VISION)


def test_a_plan_of_true_embeddings_shows_the_frames() -> None:
    pixels, visual = clip()
    patches = token_patches(visual)
    assert patches.shape == (visual.tokens, 3, 8, 8) and visual.grid == (3, 6, 8)
    embeds = randn(visual.tokens, WIDTH)
    picture = plan_picture(3 * embeds, (3, 3, 4), embeds, patches, chunk=5)
    assert torch.equal(picture, torch.cat([pixels[:, 0], pixels[:, 2], pixels[:, 4]], dim=2))


def test_each_token_shows_the_patch_with_the_largest_cosine() -> None:
    patches = token_patches(clip()[1])
    planned, gallery = randn(6, WIDTH), randn(len(patches), WIDTH, seed=1)
    picture = plan_picture(planned, (1, 2, 3), gallery, patches)
    nearest = (normalize(planned, dim=1) @ normalize(gallery, dim=1).T).argmax(1)
    for n, (row, column) in enumerate((row, column) for row in range(2) for column in range(3)):
        seen = picture[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert torch.equal(seen, patches[nearest[n]])


def test_pictures_that_cannot_be_drawn_are_errors() -> None:
    patches = token_patches(clip()[1])
    gallery = randn(len(patches), WIDTH)
    with pytest.raises(DataError, match="a plan of 5 tokens"):
        plan_picture(gallery[:5], (1, 2, 3), gallery, patches)
    with pytest.raises(DataError, match="a gallery of 0 embeddings"):
        plan_picture(gallery[: prod(IMAGE)], IMAGE, gallery[:0], patches[:0])
    with pytest.raises(DataError, match="a plan 5 wide and a gallery 6 wide"):
        plan_picture(gallery[: prod(IMAGE), :5], IMAGE, gallery, patches)

"""The study of segment encodings: its batches, its scores, its intervals, and the whole path from data to page."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality.rope_study.__main__ import main
from benchmarks.quality.rope_study.batches import Layout
from benchmarks.quality.rope_study.data import Batch, Clips, Examples, load
from benchmarks.quality.rope_study.scoring import SEED, read_output, sample, settings
from benchmarks.quality.rope_study.table import Records, estimate, page
from benchmarks.quality.rope_study.training import ARCHITECTURE, Recipe, draw_sigmas, train
from bernini.errors import DataError
from bernini.flow.guidance import Omegas
from bernini.flow.noise import NoiseConfig
from bernini.renderer.experts import Experts
from bernini.renderer.packing import PackedSample, Segment, pack
from bernini.renderer.sampling import RenderRequest, SamplingConfig, Source, render, source_ids
from bernini.tasks import get_task
from datamodules.toyworld import Scene
from datamodules.toyworld import render as draw_scene

ROOT = Path(__file__).parents[2]
CLIPS = Clips(frames=5, size=32)


def make_examples(draw, samples: int, count: int, channels: int = 4, width: int = 12) -> Examples:
    sources = torch.arange(samples * count).view(samples, count) % 5
    return Examples(draw(5, channels, 1, 4, 4), sources, draw(samples, channels, 2, 4, 4), draw(samples, 3, width))


def test_the_study_needs_neither_av_nor_lightning_nor_wandb():
    code = "import sys, benchmarks.quality.rope_study.__main__; print(*{m.partition('.')[0] for m in sys.modules})"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert not set(modules.split()) & {"av", "lightning", "wandb", "webdataset"}


def test_a_filled_layout_is_the_pack_of_the_samples(randn):
    examples = make_examples(randn(0), 6, 3)
    first, second = examples.batch(torch.arange(3)), examples.batch(torch.arange(3, 6))
    filled = Layout.of(first, [1, 2, 3], (1, 2, 2)).fill(second, 2 * second.targets, torch.tensor([1.0, 20.0, 300.0]))
    expected = pack(
        [
            PackedSample([*map(Segment, sources, [1, 2, 3]), Segment(2 * target, 0)], context, timestep)
            for sources, target, context, timestep in zip(
                second.sources, second.targets, second.contexts, (1.0, 20.0, 300.0), strict=True
            )
        ],
        (1, 2, 2),
    )
    for field in fields(expected):
        torch.testing.assert_close(getattr(filled, field.name), getattr(expected, field.name), rtol=0, atol=0)


@pytest.mark.parametrize("numbering", ["interpolate", "extend"])
def test_sampling_is_that_of_the_renderer(numbering, tiny_model, randn):
    model, examples = tiny_model(0).eval(), make_examples(randn(0), 1, 6)
    given: Batch = examples.batch(torch.arange(1))
    made = sample(model, examples, source_ids(6, numbering), steps=3, batch=2)
    request = RenderRequest(
        tuple(given.targets.shape[1:]),
        [Source(x, is_video=False) for x in given.sources[0]],
        given.contexts[0],
        torch.zeros_like(given.contexts[0]),
        "v2v",
        SEED,
    )
    config = SamplingConfig(steps=3, omegas=Omegas(txt=1.0), beyond_trained=numbering)  # weight 1 is no guidance
    (expected,) = render(Experts(model, boundary=0.0), [request], config)
    torch.testing.assert_close(made[0], expected, rtol=1e-4, atol=1e-4)


def test_noise_levels_are_those_of_the_renderer():
    drawn = draw_sigmas(Recipe("sa3d", seed=3, steps=40, batch=100)).flatten()
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    expected = torch.tensor(NoiseConfig().draw_sigmas([get_task("r2v")] * 4000, "single", generators))
    quantiles = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(drawn.quantile(quantiles), expected.quantile(quantiles), rtol=0, atol=0.03)


def test_training_learns_and_encodings_see_the_same(randn, tmp_path):
    examples = {count: make_examples(randn(count), 4, count, channels=16, width=64) for count in (1, 2)}
    examples = {count: replace(e, targets=0.1 * e.targets) for count, e in examples.items()}
    losses = {
        encoding: train(Recipe(encoding, 0, 30, 8, 2e-3), examples, tmp_path / encoding)["loss"]
        for encoding in ("plain", "embedding")
    }
    assert losses["plain"][0] == losses["embedding"][0]
    assert losses["plain"] != losses["embedding"]
    assert all(np.mean(loss[-5:]) < 0.8 * np.mean(loss[:5]) for loss in losses.values())


def two_things(references: int):
    items = (CLIPS.item("held_out", references, index) for index in range(99))
    return next(item for item in items if len(item.info["truth"]["target"]["things"]) == 2)


def looks_of(scene: Scene, *order: int) -> Scene:
    """The scene with the looks of its things exchanged."""
    looks = [scene.things[i] for i in order]
    things = zip(scene.things, looks, strict=True)
    swapped = (replace(a, shape=b.shape, colour=b.colour, texture=b.texture, size=b.size) for a, b in things)
    return replace(scene, things=tuple(swapped))


def test_things_that_swap_places_are_not_in_place():
    item = two_things(2)
    target = Scene.from_json(item.info["truth"]["target"])
    right, swapped = (read_output(item, draw_scene(looks_of(target, *order), 9, 64, 64)) for order in ((0, 1), (1, 0)))
    assert right["in_place"] == right["copied"] == right["identity"] == 1
    assert swapped["copied"] == swapped["identity"] == 1
    # Either thing is taken from either image alike: the mean over right and swapped.
    assert right["chance"] == swapped["chance"] == pytest.approx((1 + swapped["in_place"]) / 2)
    assert swapped["in_place"] < 0.7
    assert sorted(right["named"]) == [0, 1]
    nothing = read_output(item, torch.zeros(3, 9, 64, 64, dtype=torch.uint8))
    assert nothing["in_place"] == nothing["copied"] == 0


def test_the_named_images_are_those_of_the_things():
    for index in range(20):
        item = CLIPS.item("held_out", 10, index)
        truth, record = item.info["truth"], read_output(item, item.targets[0].media.pixels)
        assert len(item.sources) == 10
        for number, image in zip(truth["references"], record["named"], strict=True):
            thing, shown = truth["target"]["things"][number], truth["sources"][image]["things"][0]
            assert all(thing[k] == shown[k] for k in ("shape", "colour", "texture"))


def test_intervals_know_seeds_and_items():
    rng = np.random.default_rng(1)
    flat = np.full((3, 50), 0.5)
    assert estimate(flat).bounds == (0.5, 0.5)
    items = estimate(np.tile(rng.random(50) < 0.5, (3, 1)).astype(float)).bounds
    assert items[1] - items[0] == pytest.approx(4 * 0.5 / np.sqrt(50), rel=0.15)
    low, high = estimate(flat + np.array([[-0.2], [0.0], [0.2]])).bounds
    assert low < 0.4 and high > 0.6
    # Paired: what seeds and items have in common does not blur a difference.
    noisy = rng.random((3, 50))
    gap = estimate(noisy + 0.1) - estimate(noisy)
    assert gap.bounds == pytest.approx((0.1, 0.1)) and gap.mean == pytest.approx(0.1)


def write_study(folder: Path, scores: dict[str, float], seeds: dict[str, tuple[int, ...]]) -> None:
    """A study of four items whose runs have the same score everywhere."""

    def records(encoding: str, value: float) -> list[dict]:
        same = dict.fromkeys(("in_place", "identity", "attributes", "motion", "copied"), value)
        return [
            {"references": k, "numbering": n, "key": f"r2v-{i}", "named": [i + k - 4], "chance": 1 / k, **same}
            for k, n in settings(encoding)
            for i in range(4)
        ]

    folder.mkdir()
    data = {"frames": 9, "size": 64, "samples": 100, "held_out": 4}
    (folder / "vae.json").write_text(json.dumps({"encoding": "vae", "data": data, "records": records("plain", 0.9)}))
    machine = {"processor": "P", "gpu": "G", "torch": "2", "date": "D"}
    for encoding, value in scores.items():
        run = {"recipe": {"steps": 7, "batch": 5, "lr": 0.1}, "parameters": 3, "loss": [1.0], "seconds": 2.0}
        run["environment"] = machine
        for seed in seeds[encoding]:
            facts = {"encoding": encoding, "seed": seed, "sampling_steps": 16, "run": run}
            (folder / f"{encoding}-{seed}.json").write_text(json.dumps({**facts, "records": records(encoding, value)}))


def test_verdicts_follow_the_figures(tmp_path):
    seeds = dict.fromkeys(("sa3d", "plain", "embedding"), (0, 1))
    write_study(tmp_path / "a", {"sa3d": 0.75, "plain": 0.25, "embedding": 0.875}, seeds)
    text = page(Records(tmp_path / "a"))
    assert "against plain 3D RoPE: better with 1 image; better with 2 images; better with 4 images." in text
    assert "against learned embedding: worse with 1 image; worse with 2 images; worse with 4 images." in text
    assert "fractional against integer ids, by `copied`: not told apart with 6 images;" in text
    assert "| SA-3D RoPE less plain 3D RoPE | +50.0 [+50.0, +50.0] |" in text
    assert "| any image alike | 100.0 | 50.0 | 25.0 |" in text


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    scores = dict.fromkeys(("sa3d", "plain", "embedding"), 0.5)
    write_study(tmp_path / "a", scores, {"sa3d": (0, 1), "plain": (0, 1), "embedding": (0,)})
    with pytest.raises(DataError, match=r"embedding: \[0\]"):
        Records(tmp_path / "a")
    write_study(tmp_path / "b", scores, dict.fromkeys(scores, (0,)))
    other = json.loads((tmp_path / "b" / "plain-0.json").read_text())
    other["records"][0]["key"] = "r2v-9"
    (tmp_path / "b" / "plain-0.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match="other items"):
        Records(tmp_path / "b")
    with pytest.raises(DataError, match="no samples"):
        Records(tmp_path / "c")


def test_from_data_to_page(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert main(["train", *out, "--encoding", "sa3d"]) == 77
    assert "rope_study data" in capsys.readouterr().err
    sizes = "--samples 4 --held-out 2 --frames 5 --size 32 --workers 1 --device cpu"
    assert main(["data", *out, *sizes.split()]) == 0
    examples = load(tmp_path / "train.safetensors", torch.device("cpu"))
    assert [e.sources.shape for e in examples.values()] == [(4, k) for k in (1, 2, 3, 4, 5)]
    assert examples[5].targets.shape == (4, 16, 2, 4, 4)
    for encoding in ("sa3d", "plain", "embedding"):
        which = [*out, "--encoding", encoding, "--device", "cpu"]
        assert main(["train", *which, "--steps", "3", "--batch", "2"]) == 0
        assert main(["score", *which, "--steps", "1", "--workers", "0"]) == 0
        run = json.loads((tmp_path / f"{encoding}-0.json").read_text())
        found = {(r["references"], r["numbering"]) for r in run["records"]}
        assert found == set(settings(encoding)) and len(run["records"]) == 2 * len(found)
    assert main(["table", *out, "--page", str(tmp_path / "docs" / "rope.md")]) == 0
    text = (tmp_path / "docs" / "rope.md").read_text()
    assert text.count("| plain 3D RoPE | blind to ids |") == 4
    assert "--steps 3 --batch 2" in text and f"{1_226_944:,}" in text
    assert main(["score", *out, "--encoding", "sa3d", "--seed", "7"]) == 77
    assert main(["train", *out, "--encoding", "sa3d", "--steps", "0"]) == 78


def test_encodings_of_the_study_differ_in_nothing_else():
    shapes = {
        encoding: {n: p.shape for n, p in replace(ARCHITECTURE, segment_encoding=encoding).build().named_parameters()}
        for encoding in ("sa3d", "plain", "embedding")
    }
    assert shapes["sa3d"] == shapes["plain"]
    assert set(shapes["embedding"]) - set(shapes["sa3d"]) == {"segment_embedding.weight"}

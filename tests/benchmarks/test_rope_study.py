"""The study of segment encodings: equal beginnings, its scores, its intervals, and the whole path from fit to page."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality.rope_study.__main__ import main
from benchmarks.quality.rope_study.items import Clips, held_out, read_output, settings
from benchmarks.quality.rope_study.table import Records, estimate, page
from bernini.cli import main as bernini
from bernini.errors import DataError
from bernini.renderer.experts import Experts
from datamodules.toyworld import Scene
from datamodules.toyworld import render as draw_scene

ROOT = Path(__file__).parents[2]
CLIPS = Clips(frames=5, height=32, width=32)
ENCODINGS = ("embedding", "plain", "sa3d")


def modules_after(import_: str) -> set[str]:
    code = f"import sys, {import_}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout.split())


def test_the_study_needs_neither_av_nor_wandb_and_its_reading_processes_no_models():
    commands = modules_after("benchmarks.quality.rope_study.__main__")
    assert "benchmarks" in commands and not commands & {"av", "wandb", "webdataset"}
    reading = modules_after("benchmarks.quality.rope_study.items, benchmarks.quality.scoring")
    assert "benchmarks" in reading and not reading & {"av", "wandb", "webdataset", "lightning"}


def two_things(references: int):
    items = (held_out(CLIPS, references, index) for index in range(99))
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
        item = held_out(CLIPS, 10, index)
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
    data = {"frames": 9, "height": 64, "width": 64, "held_out": 4}
    (folder / "vae.json").write_text(json.dumps({"encoding": "vae", "data": data, "records": records("plain", 0.9)}))
    facts = {
        "recipe": {"steps": 7, "batch": 5, "lr": 0.1, "samples": 100},
        "data": data,
        "sampling_steps": 16,
        "parameters": 3,
        "loss": 1.0,
        "environment": {"processor": "P", "gpu": "G", "torch": "2", "date": "D"},
    }
    for encoding, value in scores.items():
        for seed in seeds[encoding]:
            run = {"encoding": encoding, "seed": seed, **facts, "records": records(encoding, value)}
            (folder / f"{encoding}-{seed}.json").write_text(json.dumps(run))


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
    write_study(tmp_path / "d", scores, dict.fromkeys(scores, (0,)))
    other["recipe"]["steps"] = 8
    (tmp_path / "d" / "plain-0.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match="differ in recipe"):
        Records(tmp_path / "d")
    with pytest.raises(DataError, match="no bounds"):
        Records(tmp_path / "c")


def fit(folder: Path, encoding: str, monkeypatch: pytest.MonkeyPatch, lr: float = 0.002) -> Path:
    """Train for two steps on tiny clips; the first run makes the samples for all."""
    run = folder / f"{encoding}-0"
    monkeypatch.setenv("RUN", str(run))
    monkeypatch.chdir(ROOT)
    chosen = ["--model.init_args.architecture.segment_encoding", encoding, "--seed_everything", "0"]
    schedule = "--model.lr_scheduler.init_args"
    tiny = "--trainer.max_steps=2 --trainer.accelerator=cpu --trainer.precision=32-true --trainer.log_every_n_steps=1"
    size = "--model.compile=false --data.length=32 --data.frames=5 --data.height=32 --data.width=32 --data.workers=0"
    rates = [f"{schedule}.total_steps=3", f"{schedule}.max_lr={lr}", f"--data.file={folder / 'bank.safetensors'}"]
    more = ["--data.tasks={r2v: 8}", "--trainer.enable_progress_bar=false"]
    arguments = [*chosen, *tiny.split(), *size.split(), *rates, *more]
    assert bernini(["fit", "-c", "configs/toy/rope.yaml", *arguments]) == 0
    return run


def test_runs_of_one_seed_differ_in_the_encoding_alone(tmp_path, monkeypatch):
    weights, losses = {}, {}
    for encoding in ENCODINGS:  # the first makes the samples, the others read them
        run = fit(tmp_path, encoding, monkeypatch, lr=0.0)
        weights[encoding] = Experts.from_pretrained(run).at(0).state_dict()
        with (run / "logs" / "metrics.csv").open() as file:
            losses[encoding] = [row["train/loss"] for row in csv.DictReader(file)]
    vectors = weights["embedding"].pop("segment_embedding.weight")
    assert not vectors.any()
    for encoding in ("plain", "embedding"):
        assert weights[encoding].keys() == weights["sa3d"].keys()
        assert all(torch.equal(weights[encoding][name], weights["sa3d"][name]) for name in weights["sa3d"])
    assert len(losses["plain"]) == 2 and losses["plain"] == losses["embedding"] != losses["sa3d"]


def test_from_fit_to_page(tmp_path, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "scores")]
    assert main(["score", str(tmp_path), *out]) == 77
    assert "configs/toy/rope.yaml" in capsys.readouterr().err
    runs = [str(fit(tmp_path, encoding, monkeypatch)) for encoding in ENCODINGS]
    few = [*out, "--device", "cpu", "--held-out", "3", "--batch", "2"]
    assert main(["bounds", *few, "--frames", "5", "--size", "32", "--workers", "2"]) == 0
    assert main(["score", *runs, *few, "--steps", "1", "--workers", "0"]) == 0
    assert "sa3d-0: 10 images, fractional ids: " in capsys.readouterr().out
    for encoding in ENCODINGS:
        scores = json.loads((tmp_path / "scores" / f"{encoding}-0.json").read_text())
        found = {(r["references"], r["numbering"]) for r in scores["records"]}
        assert found == set(settings(encoding)) and len(scores["records"]) == 3 * len(found)
        assert scores["recipe"] == {"steps": 2, "batch": 8, "lr": 0.002, "samples": 32}
        assert (scores["encoding"], scores["seed"]) == (encoding, 0) and scores["loss"] > 0
    assert main(["table", *out, "--page", str(tmp_path / "docs" / "rope.md")]) == 0
    text = (tmp_path / "docs" / "rope.md").read_text()
    assert text.count("| plain 3D RoPE | blind to ids |") == 4
    assert "--trainer.max_steps 2 " in text and f"{1_226_944:,}" in text and "guidance 1 (1 is none)" in text
    assert main(["score", *runs, *out, "--steps", "0"]) == 78

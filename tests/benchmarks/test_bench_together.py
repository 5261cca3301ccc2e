"""Official figures of runs that are scored from pixels, by models and by a judge, over few items of official files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judges import Replies, make_judge
from official_files import PICTURE_SIZE, WRITERS
from servers import Server, chat_server
from tiny_encoders import write_clip, write_dino, write_dinov2, write_head

from benchmarks.quality.environment import environment
from benchmarks.quality.folder import RunFolder, describe
from benchmarks.quality.inquiries.registry import INQUIRIES
from benchmarks.quality.judged_scoring import score_by_judge
from benchmarks.quality.model_scoring import groups, score_by_model
from benchmarks.quality.official.needs import Places
from benchmarks.quality.official.registry import OFFICIAL
from benchmarks.quality.scoring import score
from benchmarks.quality.summary import aggregate
from benchmarks.quality.tallying import tally
from benchmarks.quality.totals.records import SHARE
from bernini.media import write_image, write_video

SIZES = {"frames": 9, "max_edge": 64, "min_edge": 32, "height": 32, "width": 32, "accept_licence": True}
FEW = {
    "five": {"five.ENTRIES": (*[(1, 1)] * 5, (2, 2))},
    "opens2v": {
        "opens2v.KINDS": dict.fromkeys(("singleobj", "singlehuman"), 2),
        "opens2v.FILES": {"open": ("Open-Domain_Eval.json", 4)},
    },
}
ANSWERS = {
    "editverse": "Instruction: 3\nQuality: 1\nBackground: 2",
    "ivebench": "2",
    "opens2v": "4",
    "five": "yes",
}
FIGURES: dict[str, dict[str, dict[str, tuple[str, Any]]]] = {
    "editverse": {
        "EditVerseBench": {
            "editing_quality": ("editing_quality", lambda value: value),
            "pick": ("pick", lambda value: value),
            "frame_text": ("frame_text", lambda value: value),
            "clip_tc": ("clip_tc", lambda value: 100 * value),
            "dino_tc": ("dino_tc", lambda value: 100 * value),
        }
    },
    "ivebench": {"IVEBench": {name: (name, lambda value: value) for name in ("SC", "BC", "TF", "IS", "CF")}},
    "opens2v": {
        "OpenS2V-Eval": {
            "aesthetics": ("aesthetics", lambda value: 100 * (min(max(value, 4), 7) - 4) / 3),
            "motion_amplitude": ("motion_amplitude", lambda value: 100 * min(value, 1)),
            "natural_score": ("natural_score", lambda value: 100 * (value - 1) / 4),
        }
    },
    "five": {
        "FiVE-Acc": {name: (name, lambda value: 100 * value) for name in ("yn", "mc", "union", "inter")},
        "FiVE": {
            "dist_e3": ("structure_distance", lambda value: 1e3 * value),
            "psnr": ("psnr_unedit_part", lambda value: value),
            "mse_e4": ("mse_unedit_part", lambda value: 1e4 * value),
            "ssim_e2": ("ssim_unedit_part", lambda value: 1e2 * value),
            "clip": ("clip_similarity_target_image", lambda value: value),
            "clip_edit": ("clip_similarity_target_image_edit_part", lambda value: value),
        },
    },
}
"""What is scored here of each official figure, and how an item's score is printed."""
TOTALS = {"ivebench": "total", "opens2v": "total"}


@pytest.fixture
def server() -> Iterator[Server]:
    with chat_server() as server:
        yield server


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    write_dino(root / "dino-vitb16")
    write_dino(root / "dino-vitb8", patch=8)
    write_dinov2(root / "dinov2-base")
    for seed, name in enumerate(("clip-vit-base-patch32", "clip-vit-large-patch14", "PickScore_v1")):
        write_clip(root / name, seed)
    write_clip(root / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    write_head(root / "aesthetic-model.pth", (12, 8, 4, 1))
    return root


@pytest.mark.parametrize("name", FIGURES)
def test_a_run_has_the_official_figures_of_all_that_scored_it(
    name: str, weights: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, few in FEW.get(name, {}).items():
        monkeypatch.setattr(f"benchmarks.quality.official.{place}", few)
    WRITERS[name](tmp_path / "data")
    for mask in (tmp_path / "data").glob("bmasks/*/*"):
        half = (torch.arange(PICTURE_SIZE[1]) < 40).to(torch.uint8) * 255
        write_image(mask, half.expand(3, 1, *PICTURE_SIZE))
    known = OFFICIAL[name].__dataclass_fields__
    benchmark = OFFICIAL[name](root=str(tmp_path / "data"), **{k: v for k, v in SIZES.items() if k in known})
    items, folder = benchmark.items(), RunFolder(tmp_path / "run")
    folder.start(describe(benchmark, items, len(items)), environment(), benchmark.located())
    noise = torch.Generator().manual_seed(0)
    for item in items:
        expect, path = item.expect, folder.output(benchmark, item)
        size = (3, expect.frames, expect.height, expect.width)
        write_video(path, torch.randint(256, size, generator=noise, dtype=torch.uint8), expect.fps)
        folder.generated.append([{"id": item.id, "file": str(path.relative_to(folder.root)), "seed": 0}])

    score(benchmark, items, folder)
    for group in groups(benchmark, Places(folders=(weights,))):
        if not {"lpips_unedit_part", "niqe_target_image"} & group.measures.keys():
            score_by_model(benchmark, items, folder, group, device=torch.device("cpu"))
    Replies(server, lambda text: "b" if "letter" in text else ANSWERS[name])
    score_by_judge(INQUIRIES[name](benchmark), items, folder, make_judge(server.url))

    found = aggregate(benchmark, items, folder)
    assert found["failures"] == [] and found["coverage"] == 1 and not found["comparable"]
    values = folder.values(folder.scored(benchmark))
    scored = {metric for _, metric in values}
    for total in found["totals"]:
        figures = {row["figure"]: (row["value"], row["n"]) for row in total["figures"]}
        wanted = FIGURES[name][total["title"]]
        assert wanted.keys() <= figures.keys() <= wanted.keys() | {"five_acc"} and total["why"] == ""
        for figure, (metric, shown) in wanted.items():
            own = {one: shown(value) for (one, scored), value in values.items() if scored == metric}
            kinds = {item.category if name == "five" else "" for item in items}  # which weigh alike
            means = [np.mean([own[i.id] for i in items if i.id in own and kind in ("", i.category)]) for kind in kinds]
            assert figures[figure] == (pytest.approx(np.mean(means)), len(own)) and len(own) >= len(items) - 1
    assert {row["score"] for row in found["missing"]} == benchmark.metrics.keys() - scored

    ranges = {metric: benchmark.ranges.get(metric, SHARE) for metric in benchmark.metrics}
    rest = {
        (item.id, metric): min(max(0.5, ranges[metric].low), ranges[metric].high)
        for item in items
        for metric in item.metrics
        if metric not in scored
    }
    for total, before in zip(tally(benchmark.tallies(items), values | rest, True), found["totals"], strict=True):
        figures, known_ = ({row["figure"]: row for row in one["figures"]} for one in (total, before))
        assert all(figures[figure] == row for figure, row in known_.items())
        assert (TOTALS.get(name) in figures) == (name in TOTALS) and TOTALS.get(name) not in known_

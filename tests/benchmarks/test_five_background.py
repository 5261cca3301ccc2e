"""FiVE's figures of the background, against torchmetrics and Pillow, over frames and masks in files."""

import json
import math
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from official_files import WRITERS
from PIL import Image
from torchmetrics.functional import mean_squared_error
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from benchmarks.quality.environment import environment
from benchmarks.quality.folder import RunFolder, describe
from benchmarks.quality.interface import Item, cell
from benchmarks.quality.official.five import FiVE, compared
from benchmarks.quality.page import write_page
from benchmarks.quality.scoring import score
from benchmarks.quality.summary import aggregate
from benchmarks.quality.totals.records import Range
from bernini.errors import DataError
from bernini.media import write_video

SIZE = 40, 60


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> FiVE:
    """The first of whose clips has eighteen frames, with masks that move."""
    root = tmp_path_factory.mktemp("five")
    WRITERS["five"](root)
    noise = np.random.default_rng(0)
    for folder in (root / "images/0000_bus", root / "bmasks/0000_bus"):
        for old in folder.iterdir():
            old.unlink()
    for t in range(18):
        mask = np.zeros(SIZE, np.uint8)
        mask[5:25, t : t + 20] = 1 if t < 9 else 255  # what is not black covers, however dark
        Image.fromarray(mask).save(root / f"bmasks/0000_bus/{t:05d}.png")
        Image.fromarray(noise.integers(0, 256, (*SIZE, 3), np.uint8)).save(root / f"images/0000_bus/{t:05d}.png")
    return FiVE(root=str(root), accept_licence=True, frames=17, max_edge=64, min_edge=32)


def item_of(five: FiVE, frames: int) -> Item:
    item = five.items()[0]
    return replace(item, expect=replace(item.expect, frames=frames))


@pytest.mark.parametrize(
    ("frames", "size"),
    [(17, SIZE), (9, SIZE), (21, SIZE), (17, (32, 48))],
)
def test_figures_are_those_of_the_official_steps(five: FiVE, frames: int, size: tuple[int, int]) -> None:
    """Every eighth frame of both, the output resized by Pillow, both multiplied by what is not masked."""
    item = item_of(five, frames)
    output = torch.randint(256, (3, frames, *size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    wanted = []
    for t in range(0, min(frames, 18), 8):
        made = Image.fromarray(output[:, t].permute(1, 2, 0).numpy()).resize(SIZE[::-1])
        source = Image.open(five.folder / f"images/0000_bus/{t:05d}.png")
        seen = ~(np.array(Image.open(five.folder / f"bmasks/0000_bus/{t:05d}.png")) > 0)[..., None]
        a, b = (
            torch.from_numpy(np.array(image) / 255 * seen).permute(2, 0, 1)[None].contiguous()
            for image in (made, source)
        )
        similar = structural_similarity_index_measure(a, b, data_range=1.0)
        wanted.append([peak_signal_noise_ratio(a, b, data_range=1.0), mean_squared_error(a, b), similar])
    assert len(compared(five.folder, item)) == len(wanted) == {17: 3, 9: 2, 21: 3}[frames]
    found = five.score(item, output)
    assert list(found) == ["psnr_unedit_part", "mse_unedit_part", "ssim_unedit_part"] == list(five.measured())
    assert list(found.values()) == pytest.approx(np.mean(wanted, 0).tolist(), rel=1e-5)


def test_an_output_that_leaves_the_background_alone_is_perfect(five: FiVE) -> None:
    item = item_of(five, 17)
    files = [five.folder / f"images/0000_bus/{t:05d}.png" for t in range(17)]
    output = torch.from_numpy(np.stack([np.array(Image.open(file)) for file in files])).permute(3, 0, 1, 2).clone()
    for t in range(17):
        output[:, t, 5:25, t : t + 20] = 0  # the edit
    found = five.score(item, output)
    assert found == {"psnr_unedit_part": float("inf"), "mse_unedit_part": 0, "ssim_unedit_part": pytest.approx(1)}
    infinite = cell("v2v", "psnr_unedit_part", [20.0, found["psnr_unedit_part"]], 2, Range())
    assert infinite[2:] == (float("inf"),) * 3 + (2, 2)


def test_infinite_figures_and_scores_that_do_not_exist_reach_the_report(tmp_path: Path) -> None:
    """Both outputs are black as their sources, one of whose masks hide all."""
    WRITERS["five"](tmp_path)
    for number, level in enumerate((0, 255)):
        for kind, image in (("images", Image.new("RGB", SIZE[::-1])), ("bmasks", Image.new("L", SIZE[::-1], level))):
            file = tmp_path / kind / f"{number:04d}_bus/00001.jpg"
            file.unlink()  # one file has many names
            image.save(file)
    benchmark = FiVE(root=str(tmp_path), accept_licence=True, frames=1, max_edge=64, min_edge=32)
    every = benchmark.items()
    items, folder = every[:2], RunFolder(tmp_path / "run")
    folder.start(describe(benchmark, items, len(every)), environment(), benchmark.located())
    for item in items:
        path = folder.output(benchmark, item)
        write_video(path, torch.zeros(3, 1, item.expect.height, item.expect.width, dtype=torch.uint8), item.expect.fps)
        folder.generated.append([{"id": item.id, "file": str(path.relative_to(folder.root)), "seed": 0}])
    score(benchmark, items, folder)
    rows = [file.read_bytes() for file in sorted((folder.root / "scores").iterdir())]
    score(benchmark, items, folder)
    assert rows == [file.read_bytes() for file in sorted((folder.root / "scores").iterdir())], "nothing is scored again"
    found = aggregate(benchmark, items, folder)
    names = ["psnr_unedit_part", "mse_unedit_part", "ssim_unedit_part"]
    assert [cell[1:] for cell in (tuple(cell.values()) for cell in found["cells"])] == [
        (names[0], math.inf, math.inf, math.inf, 1, 1),
        (names[1], 0, 0, 0, 1, 1),
        (names[2], 1, 1, 1, 1, 1),
    ]
    assert (
        found["failures"] == [] and found["coverage"] == 1 and folder.void(names) == {(items[1].id, n) for n in names}
    )
    for file in (folder.root / "summary.json", *(folder.root / "scores").iterdir()):
        for text in [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines():
            json.loads(text, parse_constant=pytest.fail)
    assert json.loads((folder.root / "summary.json").read_text())["cells"][0]["value"] == "inf"
    assert folder.summary() == json.loads(json.dumps(found)) and folder.values(names)[items[0].id, names[0]] == math.inf
    assert "| inf [inf, inf] |" in (folder.root / "table.md").read_text()
    page = write_page(benchmark, items, folder, 2).read_text()
    assert "inf" in page and "score missing" not in page


def test_the_list_names_the_frames_and_masks_that_count(five: FiVE) -> None:
    names = [name for name in five.source_files(item_of(five, 17)) if "mp4" not in name]
    assert names == [f"{kind}/0000_bus/{t:05d}.png" for t in (0, 8, 16) for kind in ("images", "bmasks")]


def test_masks_that_hide_all_frames_leave_nothing_to_score(five: FiVE, tmp_path: Path) -> None:
    copytree(five.folder / "images/0000_bus", tmp_path / "images/0000_bus")
    for name in compared(five.folder, item_of(five, 17)):
        (tmp_path / "bmasks/0000_bus").mkdir(parents=True, exist_ok=True)
        Image.new("L", SIZE[::-1], 9).save(tmp_path / "bmasks/0000_bus" / name)
    found = replace(five, root=str(tmp_path)).score(item_of(five, 17), torch.zeros(3, 17, 32, 48, dtype=torch.uint8))
    assert found == dict.fromkeys(five.measured())


@pytest.mark.parametrize(
    ("path", "change", "told"),
    [
        ("bmasks/0000_bus/00008.png", lambda p: p.unlink(), "does not exist"),
        ("bmasks/0000_bus/00008.png", lambda p: Image.new("L", (20, 20)).save(p), "sizes"),
        ("bmasks/0000_bus", lambda p: [Image.new("L", (20, 20), 9).save(f) for f in p.iterdir()], "masks are .20, 20."),
        ("images/0000_bus", lambda p: [file.unlink() for file in p.iterdir()], "no frames of the source"),
    ],
)
def test_what_cannot_be_compared_is_told(five: FiVE, tmp_path: Path, path: str, change, told: str) -> None:
    for kind in ("images", "bmasks"):
        copytree(five.folder / kind / "0000_bus", tmp_path / kind / "0000_bus")
    item = item_of(five, 17)
    change(tmp_path / path)
    with pytest.raises(DataError, match=told):
        replace(five, root=str(tmp_path)).score(item, torch.zeros(3, 17, 32, 48, dtype=torch.uint8))

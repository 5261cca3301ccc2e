"""Outputs of official benchmarks, made by the toy model: whatever the task, they are what their items expect."""

from pathlib import Path

import pytest
import torch
from official_files import WRITERS

from benchmarks.quality.folder import RunFolder, read_output
from benchmarks.quality.generating import generate
from benchmarks.quality.official.registry import OFFICIAL
from benchmarks.quality.sampler import Model, load_sampler
from bernini.renderer.sampling import SamplingConfig

TOY = Path(__file__).parents[2] / "assets" / "toy"
SMALL = {
    "vbench": {"frames": 5, "height": 32, "width": 48},
    "vbench_i2v": {"frames": 5, "max_edge": 64, "min_edge": 32},
    "opens2v": {"frames": 5, "height": 32, "width": 48, "max_edge": 64, "min_edge": 32},
    "five": {"frames": 5, "max_edge": 64, "min_edge": 32},
    "editverse": {"frames": 9, "max_edge": 64, "min_edge": 32},
    "gedit": {"max_edge": 64, "min_edge": 32},
    "geneval": {"height": 32, "width": 48},
}
"""One benchmark of each task."""


@pytest.fixture(scope="module")
def toy() -> Model:
    config = SamplingConfig(steps=1)
    return load_sampler(
        TOY, lora=None, vae=TOY, text=TOY, rows=48, config=config, dtype="float32", device=torch.device("cpu")
    )


@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_made_as_their_items_expect(name: str, toy: Model, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "data")
    benchmark = OFFICIAL[name](root=str(tmp_path / "data"), accept_licence=True, **SMALL[name])
    items = list({item.task: item for item in benchmark.items()}.values())
    folder = RunFolder(tmp_path / "run")
    generate(benchmark, items, toy, folder, seed=42, batch_size=2)
    rows = folder.generated.rows()
    assert [rows[item.id].get("failed") for item in items] == [None] * len(items)
    for item in items:
        path = tmp_path / "run" / "videos" / item.extra["output"]
        pixels = read_output(path, item)
        assert pixels.shape == (3, item.expect.frames, item.expect.height, item.expect.width)
        assert rows[item.id]["seed"] == item.seed(42)

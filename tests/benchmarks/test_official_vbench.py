"""VBench from the JSON files of its own packages: exact names, and going on where files were removed.

The packages are not fetched here: ``pip download --no-deps vbench==0.1.5 vbench2==0.1.1``, unpack both wheels into one
folder, and name it in ``BERNINI_VBENCH``; without it ``~/.cache/bernini/vbench`` is looked at.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.quality.folder import RunFolder
from benchmarks.quality.generating import generate
from benchmarks.quality.official.vbench import PER_DIMENSION, VBench
from benchmarks.quality.official.vbench2 import PER_DIMENSION as PER_DIMENSION_2
from benchmarks.quality.official.vbench2 import VBench2, score_name
from bernini.conversation import Conversation


@pytest.fixture(scope="module")
def wheels() -> Path:
    """Folder of the unpacked wheels."""
    folder = Path(os.environ.get("BERNINI_VBENCH") or Path.home() / ".cache" / "bernini" / "vbench")
    files = (folder / "vbench" / "VBench_full_info.json", folder / "vbench2" / "VBench2_full_info.json")
    if not all(file.is_file() for file in files):
        pytest.skip(f"no unpacked wheels in {folder}: see the head of this file")
    return folder


def test_vbench_names_are_those_that_the_official_script_looks_for(wheels: Path) -> None:
    items = VBench(root=str(wheels)).items()
    entries = json.loads((wheels / "vbench" / "VBench_full_info.json").read_text())
    wanted = [
        f"{entry['prompt_en']}-{sample}.mp4"
        for entry in entries
        for sample in range(25 if "temporal_flickering" in entry["dimension"] else 5)
    ]
    assert (len(entries), len(wanted), len(set(wanted))) == (946, 6230, 6220)  # two prompts come twice
    names = [item.extra["output"] for item in items]
    assert len(names) == 6220 and set(names) == set(wanted)
    assert sum(item.extra["entries"] for item in items) == 6230
    asked = Counter(metric for item in items if item.repeat == 0 for metric in item.metrics)
    assert asked == PER_DIMENSION
    assert max(len(item.prompt) for item in items) == 210


def test_an_installed_package_is_found_and_not_imported(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(wheels))
    assert VBench().items() == VBench(root=str(wheels)).items()
    assert VBench2().items() == VBench2(root=str(wheels)).items()
    assert not {"vbench", "vbench2"} & sys.modules.keys()


def test_vbench2_names_are_those_that_the_official_script_looks_for(wheels: Path) -> None:
    items = VBench2(root=str(wheels)).items()
    entries = json.loads((wheels / "vbench2" / "VBench2_full_info.json").read_text())
    wanted = [
        f"{entry['dimension'][0]}/{entry['prompt_en'][:180]}-{sample}.mp4"
        for entry in entries
        for sample in range(20 if entry["dimension"] == ["Diversity"] else 3)
    ]
    assert (len(entries), len(wanted), len(set(wanted))) == (1230, 3860, 3857)
    assert {item.extra["output"] for item in items} == set(wanted) and len(items) == 3857
    assert Counter(item.category for item in items for _ in range(item.extra["entries"])) == {
        score_name(name): number * (20 if name == "Diversity" else 3) for name, number in PER_DIMENSION_2.items()
    }


def test_going_on_makes_exactly_what_was_removed(wheels: Path, tmp_path: Path) -> None:
    benchmark = VBench(root=str(wheels), frames=1, height=16, width=16)
    items = [item for item in benchmark.items() if item.extra["entries"] == 2 or item.id.endswith("-24")]
    assert len(items) == 10 + 75
    made: list[str] = []

    def noise(asked: list[Conversation], seeds: list[int]) -> list[Tensor]:
        made.extend(conversation.key for conversation in asked)
        sizes = [conversation.targets[0].media.pixels.shape for conversation in asked]
        own = [torch.Generator().manual_seed(seed) for seed in seeds]
        return [torch.randint(256, size, generator=g, dtype=torch.uint8) for size, g in zip(sizes, own, strict=True)]

    folder = RunFolder(tmp_path)
    generate(benchmark, items, noise, folder, seed=42, batch_size=16)
    assert made == [item.id for item in items]
    first = {item.id: folder.output(benchmark, item).read_bytes() for item in items}
    assert {path.name for path in (tmp_path / "videos").iterdir()} == {item.extra["output"] for item in items}
    gone = items[3::9]
    for item in gone:
        folder.output(benchmark, item).unlink()
    made.clear()
    generate(benchmark, items, noise, folder, seed=42, batch_size=16)
    assert made == [item.id for item in gone]
    assert {item.id: folder.output(benchmark, item).read_bytes() for item in items} == first

"""A model of the released size in the released layout, into two halves and back: what is lost, and what it takes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from released import both_ends, make_released

from bernini.checkpoints.stored import read_folder
from bernini.cli import main
from bernini.errors import CheckpointError

ROOT = Path(__file__).parents[2]
GIB = 2**30


def size(folder: Path) -> tuple[int, int]:
    """Bytes of a folder as they seem, and as the disk holds them."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_size for stat in stats), sum(512 * stat.st_blocks for stat in stats)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The model, where the disk keeps holes."""
    folder = tmp_path_factory.mktemp("released")
    with (folder / "probe").open("wb") as file:
        file.truncate(GIB)
    if (folder / "probe").stat().st_blocks > 1000 or not hasattr(os, "SEEK_DATA"):
        pytest.skip("this disk has no sparse files")
    make_released(folder / "full", ROOT / "assets" / "toy")
    return folder / "full"


def test_all_tensors_come_back_in_little_memory(released: Path, tmp_path: Path) -> None:
    before = read_folder(released / "bernini")
    assert len(before) == 3315 and len(list((released / "bernini").glob("*.safetensors"))) == 38
    apparent, held = size(released)
    assert apparent > 160 * GIB and held < GIB / 4
    renderer, planner, again = (str(tmp_path / name) for name in ("renderer", "planner", "again"))
    code = f"""
import resource
from bernini.cli import main
assert main(["export", "model", {str(released)!r}, "--to", "renderer", "--out", {renderer!r}]) == 0
assert main(["export", "model", {str(released)!r}, "--to", "planner", "--out", {planner!r}]) == 0
assert main(["export", "model", {renderer!r}, {planner!r}, "--to", "released", "--out", {again!r}]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * {1 if sys.platform == "darwin" else 1024})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    after = read_folder(tmp_path / "again" / "bernini")
    assert after.keys() == before.keys()
    assert [name for name in before if both_ends(after[name]) != both_ends(before[name])] == []
    assert size(tmp_path)[1] < GIB  # so what lies between the ends is what it was: holes
    for name in ("config.json", "transformer_config.json", "transformer_2_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (released / name).read_bytes()
    peak = int(done.stdout.split()[-1])
    assert peak < 2 * GIB, f"{peak / GIB:.2f} GiB"
    print(f"{apparent / GIB:.1f} GiB, {held / 2**20:.0f} MiB on disk, peak {peak / GIB:.2f} GiB")


def test_a_shard_cut_short_is_named(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = released / "bernini" / "model-00017-of-00038.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    assert main(["export", "model", str(released), "--to", "renderer", "--out", str(tmp_path / "out")]) == 65
    told = capsys.readouterr().err
    assert "cut short" in told and str(shard) in told
    assert CheckpointError.exit_code == 65 and not list(tmp_path.iterdir())

"""The op built when the package is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils.cpp_extension import CUDA_HOME

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or CUDA_HOME is None, reason="needs a CUDA device and nvcc"),
    pytest.mark.skipif(int(setuptools.__version__.partition(".")[0]) < 77, reason="needs setuptools 77"),
]

ROTATE = """
import torch
from bernini.rope.op import choose_kernel, prepare_segments, sa3d_qk_norm_rope
assert choose_kernel(torch.device("cuda", 0), 128) == "fused"
table, x = torch.tensor([(0, 2, 3, 4, 0.0)], device="cuda"), torch.randn(24, 2, 128, device="cuda")
found = [sa3d_qk_norm_rope(x, x, None, None, prepare_segments(table, 24, 128, kernel=k), 1e-6)[0] for k in KERNELS]
torch.testing.assert_close(*found)
print(*torch.ops.loaded_libraries)
"""


def test_a_wheel_holds_the_op(tmp_path: Path) -> None:
    source, wheels, package = (tmp_path / name for name in ("source", "wheels", "package"))
    shutil.copytree(ROOT / "bernini", source / "bernini", ignore=shutil.ignore_patterns("_sa3d*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    architecture = "{}.{}".format(*torch.cuda.get_device_capability())
    environment = {**os.environ, "BERNINI_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", ".", "-w", str(wheels)]
    built = subprocess.run(pip, cwd=source, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(package)
    # Nothing else could be built: there is nowhere to build it.
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_EXTENSIONS_DIR": os.devnull}
    code = f"KERNELS = ('fused', 'reference')\n{ROTATE}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(package / "bernini" / "rope" / "_sa3d") in done.stdout

"""`bernini check`: what this machine has, which kernels and backends would run on it, and what training would take."""

import json
import os
import platform
import shutil
import subprocess
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

import bernini
from bernini.attention import resolve_backend
from bernini.check_memory import memory
from bernini.errors import ConfigError
from bernini.renderer.experts import SHAPES
from bernini.rope.op import VARIABLE, choose_kernel, why_not_fused

PACKAGES = ("lightning", "transformers", "diffusers")
HEAD_DIM = 128  # of every Wan and Bernini renderer


def check() -> dict[str, str]:
    """Facts of this machine and process by name. On a GPU, the fused RoPE op is built if it has not been.

    Returns:
        Versions, every device, the kernel of the rotation and why it is not a faster one, the attention backend that
        ``auto`` takes in bfloat16, the CUDA compiler, the video decoder.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    facts = {"bernini": bernini.__version__, "python": platform.python_version(), "torch": torch.__version__}
    facts["cuda"] = torch.version.cuda or "none: torch is built without it"
    facts |= {package: _version(package) for package in PACKAGES}
    facts |= {f"cuda:{i}": _gpu(i) for i in range(torch.cuda.device_count())}
    facts["cpu"] = f"{os.cpu_count()} cores, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    facts["rope"] = _rope(device)
    facts["attention"] = resolve_backend("auto", device, torch.bfloat16, HEAD_DIM)
    facts["nvcc"] = _nvcc()
    facts["video"] = f"PyAV {_version('av')}" if find_spec("av") else "none: pip install av"
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    return f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, compute capability {gpu.major}.{gpu.minor}"


def _rope(device: torch.device) -> str:
    """The kernel of the rotation, and why there is none that is faster."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a build that fails, which is said here
        try:
            kernel: str = choose_kernel(device, HEAD_DIM)
        except ConfigError as error:
            return f"none: {error.what}" + (f", {error.why}" if error.why else "")
        if kernel == "fused":
            return kernel
        if os.environ.get(VARIABLE, "auto") != "auto":
            return f"{kernel}, as {VARIABLE} has it"
        slower = "; not compiled: there is no Triton" if kernel == "reference" and device.type == "cuda" else ""
        return f"{kernel}; not fused: {why_not_fused(device, HEAD_DIM)}{slower}"


def _nvcc() -> str:
    """The CUDA compiler that torch would build with, else the one on the path."""
    from torch.utils.cpp_extension import CUDA_HOME  # importing it looks for compilers

    nvcc = shutil.which("nvcc", path=f"{CUDA_HOME}/bin") if CUDA_HOME else shutil.which("nvcc")
    if nvcc is None:
        return "not found"
    try:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return f"{nvcc}, which does not run"
    release = [line.rpartition("release ")[2].partition(",")[0] for line in told.splitlines() if "release " in line]
    return f"{nvcc}, CUDA {release[0]}" if release else nvcc


def main(argv: Sequence[str]) -> int:
    """Run `bernini check`."""
    parser = ArgumentParser(prog="bernini check", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument(
        "-c", "--config", action="append", metavar="FILE", help="tell instead what memory training by this takes"
    )
    parser.add_argument("--tokens", type=int, help="of a pack (default: the configuration's)")
    parser.add_argument("--shape", choices=SHAPES, help="of a model whose folder is not there yet")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a GPU (default: of the one that is there)")
    options = parser.parse_args(argv)
    if options.config:
        gib = options.memory
        if gib is None and torch.cuda.is_available():
            gib = round(torch.cuda.mem_get_info()[1] / 2**30, 1)
        facts = memory(options.config, options.tokens, options.shape, gib)
    else:
        facts = check()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        print("\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items()))
    return 0

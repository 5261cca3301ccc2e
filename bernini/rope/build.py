"""The CUDA library of the fused op: built when the package is installed, or else when a GPU first needs it."""

import logging
import os
import time
import warnings
from functools import lru_cache
from pathlib import Path

import torch

SOURCE = Path(__file__).resolve().parent / "csrc" / "sa3d.cu"
NAME = "bernini_sa3d"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11, the oldest that the package allows
CXX_FLAGS = ["-O3", "-std=c++17", STABLE_ABI, "-DUSE_CUDA"]
NVCC_FLAGS = [*CXX_FLAGS, "-lineinfo"]

log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def load_library() -> str:
    """Load the library, building it if need be; ranks of one machine wait for the one that builds.

    Later calls remember what came of the first.

    Returns:
        Why there is none, which a warning says once as well; empty if there is one.
    """
    try:
        built = next(iter(sorted(Path(__file__).parent.glob("_sa3d*.so"))), None)
        if built is None:
            _build()
        else:
            torch.ops.load_library(str(built))
    except (OSError, RuntimeError, ImportError) as error:
        reason = _reason(error)
        warnings.warn(
            f"the fused SA-3D RoPE op is not used: {reason}. Queries and keys are rotated by a compiled graph instead; "
            "with a CUDA toolkit (nvcc) of torch's version and ninja the op is built on first use",
            stacklevel=2,
        )
        return reason
    return ""


def _build() -> None:
    # Importing it looks for compilers, and setuptools comes with it.
    from torch.utils.cpp_extension import CUDA_HOME, load

    if CUDA_HOME is None:
        raise RuntimeError("there is no CUDA toolkit")
    began = time.perf_counter()
    # Left to itself, torch would build for every GPU of the machine, and warn about it.
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    load(NAME, [str(SOURCE)], extra_cflags=CXX_FLAGS, extra_cuda_cflags=NVCC_FLAGS, is_python_module=False)
    if (took := time.perf_counter() - began) > 5:
        log.info("built the fused SA-3D RoPE op in %.0f s", took)


def _reason(error: BaseException) -> str:
    """The line of an error that says most: a compiler's first, else its own first."""
    if isinstance(error, OSError) and error.__cause__:  # the linker's word on a library, of which torch says which
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = (line for line in lines if "error:" in line or line.startswith("nvcc fatal"))
    return next(said, lines[0] if lines else type(error).__name__)

"""What pyproject.toml cannot say: with BERNINI_BUILD_CUDA=1 the CUDA op is built now, not on first use."""

import os
from pathlib import Path

from setuptools import setup

options = {}
if os.environ.get("BERNINI_BUILD_CUDA") == "1":
    import runpy

    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CUDAExtension

    if CUDA_HOME is None:
        raise SystemExit("BERNINI_BUILD_CUDA=1 takes nvcc, and a torch that was built with CUDA")
    build = runpy.run_path(str(Path(__file__).parent / "bernini" / "rope" / "build.py"))
    options = {
        "ext_modules": [
            CUDAExtension(
                "bernini.rope._sa3d",
                [str(build["SOURCE"].relative_to(Path(__file__).parent.resolve()))],
                extra_compile_args={"cxx": build["CXX_FLAGS"], "nvcc": build["NVCC_FLAGS"]},
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
    }

setup(**options)

"""What a run ran on, so that a figure can name the machine, the versions and the date that gave it."""

import os
import platform
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import bernini

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "av", "webdataset")


def environment() -> dict[str, str]:
    """Facts of this process and machine; nothing is read from environment variables.

    Returns:
        Date (UTC), commit of the checkout if there is one, system, Python, processor with the cores that this process
        may use, memory in GiB, GPUs, and the versions of the packages that decide a result.
    """
    facts = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    if commit := _commit(Path(__file__).parents[2]):
        facts["commit"] = commit
    facts |= {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "processor": f"{_processor()}, {_cores()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "gpu": _gpus(),
        "bernini": bernini.__version__,
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def machines(scored: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """A line for each machine and day, with what was run there.

    Args:
        scored: Name and `environment` of each run.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for name, facts in scored:
        device = facts["processor"] if facts["gpu"] == "none" else facts["gpu"]
        found[f"{device}, torch {facts['torch']}, {facts['date'][:10]}"].append(name)
    return [f"{machine}: {', '.join(sorted({*names}))}" for machine, names in found.items()]


def _commit(root: Path) -> str:
    """Commit of the checkout at ``root``, marked where files differ from it; empty outside one."""

    def git(*args: str) -> str:
        run = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    if not (root / ".git").exists():
        return ""
    try:
        return git("rev-parse", "--short=12", "HEAD") + (" and uncommitted changes" if git("status", "-s") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return ""


def _processor() -> str:
    """Model name as Linux gives it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    rows = info.read_text().splitlines() if info.exists() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> str:
    """GPUs by name and number, with the CUDA version that torch was built for."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"{counted} (CUDA {torch.version.cuda})" if names else "none"

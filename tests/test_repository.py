"""What keeps the repository honest: which way imports run, links that lead somewhere, commands that exist."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import bernini

ROOT = Path(__file__).parents[1]
OUTER = {"datamodules", "callbacks", "benchmarks", "configs"}
PAGES = sorted(p for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md") for p in ROOT.glob(pattern))


def run_python(code: str) -> set[str]:
    """Lines that a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_bernini_is_light() -> None:
    modules = run_python("import sys, bernini; print(*{name.partition('.')[0] for name in sys.modules})")
    assert "bernini" in modules
    assert not modules & {*OUTER, "wandb", "av", "webdataset", "lightning"}


def test_no_module_of_bernini_needs_the_outer_packages_wandb_or_cuda() -> None:
    code = """
import importlib, pkgutil, sys
import torch, bernini
for module in pkgutil.walk_packages(bernini.__path__, "bernini."):
    if not module.name.rpartition(".")[2].startswith("_"):  # a program, and a library if one was built
        importlib.import_module(module.name)
assert not torch.cuda.is_initialized()
assert "torch.utils.cpp_extension" not in sys.modules
assert not any("sa3d" in str(library) for library in torch.ops.loaded_libraries)
print(*{name.partition(".")[0] for name in sys.modules})
"""
    assert not run_python(code) & {*OUTER, "wandb"}


def imports_on_load(body: list[ast.stmt]) -> Iterator[str]:
    """Top-level packages that a module imports when it is loaded, that is, outside functions."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports_on_load([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)])
            for handler in getattr(node, "handlers", []):
                yield from imports_on_load(handler.body)


def test_imports_on_load_are_found() -> None:
    code = (
        "try:\n import a\nexcept E:\n from b.c import d\nclass K:\n import e\nif x:\n import f.g\ndef h():\n import i"
    )
    assert set(imports_on_load(ast.parse(code).body)) == {"a", "b", "e", "f"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("bernini/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_bernini_imports_none_of_the_outer_packages(path: Path) -> None:
    assert not OUTER & set(imports_on_load(ast.parse(path.read_text()).body))


def test_every_relative_link_leads_somewhere() -> None:
    assert PAGES
    link = re.compile(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"")
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for match in link.finditer(prose):
            target = (match[1] or match[2]).partition("#")[0]
            if target and not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), (
                    f"{page.relative_to(ROOT)} links to {target}, which is not there"
                )


def test_every_make_target_that_is_written_down_exists() -> None:
    written = {
        (page.name, t) for page in PAGES for t in re.findall(r"(?:`|^\$? ?)make ([a-z-]+)", page.read_text(), re.M)
    }
    assert written
    for page, target in written:
        dry = subprocess.run(["make", "-n", target, "VENV=none"], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, f"{page} says `make {target}`: {dry.stderr}"


def test_the_gate_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == bernini.__version__
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()

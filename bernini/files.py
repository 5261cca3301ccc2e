"""Writing files so that a reader never sees half of one."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bernini.errors import ConfigError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; on success it takes the place of ``path``, on an error it goes.

    The temporary file lies in the same folder, since a rename is atomic within one filesystem only.

    Args:
        path: Final name; its folder is made when missing.

    Yields:
        Name to write to, with the suffix of ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def hash_files(files: Sequence[Path]) -> str:
    """SHA-256 over the names and contents of files, in their order."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, which appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``folder``; on success it takes that name, on an error it goes.

    Args:
        folder: Final name; the folder around it is made when missing.

    Yields:
        The folder to write to.

    Raises:
        ConfigError: ``folder`` exists.
    """
    if folder.exists():
        raise ConfigError("the folder exists", where=str(folder), fix="give another --out, or remove it")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

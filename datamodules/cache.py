"""A folder that keeps what was read from elsewhere, for all processes of a machine."""

import os
import tempfile
import time
import warnings
from pathlib import Path

from filelock import FileLock

_STALE = 3600  # seconds after which a half-written file belongs to nobody


class Cache:
    """Files under the hash of their content, never more than a limit in all.

    A file appears whole, by rename; what was unused for longest goes first. Whoever reads compares hashes, so that a
    file that has been damaged is fetched again.

    Args:
        folder: The folder; made when missing.
        limit: Most bytes.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, address: str) -> bytes | None:
        """What was put at an address, if it is still there."""
        path = self._path(address)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        return data

    def put(self, address: str, data: bytes) -> None:
        """Keep ``data``; a disk that is full, or a file above the limit, is no reason to stop."""
        if len(data) > self.limit:
            return
        try:
            descriptor, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                self._place(Path(temporary), self._path(address), len(data))
            finally:
                Path(temporary).unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(f"{self.folder} keeps nothing more: {error}", stacklevel=2)

    def discard(self, address: str) -> None:
        """Take a damaged file out; the next eviction corrects the count."""
        with FileLock(self.folder / ".lock", poll_interval=0.005):
            self._path(address).unlink(missing_ok=True)

    def _path(self, address: str) -> Path:
        return self.folder / address[:2] / address

    def _place(self, temporary: Path, path: Path, size: int) -> None:
        with FileLock(self.folder / ".lock", poll_interval=0.005):
            if path.exists():
                return
            held = self._held()
            if held is None or held + size > self.limit:
                held = self._evict(int(0.9 * self.limit) - size)
            path.parent.mkdir(exist_ok=True)
            (self.folder / ".bytes").write_text(str(held + size))  # first: whoever dies here leaves too high a count
            temporary.replace(path)

    def _held(self) -> int | None:
        """Bytes in all files, by the note that each writer leaves."""
        try:
            return int((self.folder / ".bytes").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _evict(self, target: int) -> int:
        """Remove files until at most ``target`` bytes, or nothing, are left; returns what is left."""
        files = [(path, path.stat()) for path in self.folder.glob("??/*")]
        held = sum(stat.st_size for _, stat in files)
        for path, stat in sorted(files, key=lambda file: file[1].st_mtime_ns):
            if held <= target:
                break
            path.unlink(missing_ok=True)
            held -= stat.st_size
        for path in self.folder.glob("*.tmp"):
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink(missing_ok=True)
        return held

"""What the demo's parts share: `bernini` commands that run on their own, and the folder they work in."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from benchmarks.quality.folder import RunFolder
from bernini.errors import BerniniError

ROOT = Path(__file__).parents[2]
FAMILY, PLANNING_FAMILY = ROOT / "assets" / "toy", ROOT / "assets" / "toy-bernini"
FRAMES, SIZE = 9, 64


class Failed(BerniniError):
    """A command of the demo that did not succeed."""


@dataclass(frozen=True)
class Command:
    """A `bernini` command that runs on its own.

    Attributes:
        words: What follows `bernini`.
        log: File that its output goes to.
    """

    words: tuple[str, ...]
    log: Path

    @property
    def line(self) -> str:
        """What a user would type."""
        return " ".join(("bernini", *self.words))

    def run(self, watch: Callable[[], None]) -> None:
        """Run it to its end.

        Args:
            watch: Called twice a second.

        Raises:
            Failed: With the end of the command's log.
        """
        environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as log:
            arguments = [sys.executable, "-m", "bernini", *self.words]
            process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, env=environ)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                watch()
        finally:
            process.terminate()
        if process.returncode:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])
            raise Failed(f"`{self.line}` failed", where=str(self.log), why=tail)
        watch()


def bench(model: Path, out: Path, name: str, edit: str, count: int, *more: str | Path) -> Command:
    """Score a family's edits of held-out clips.

    Args:
        model: The family.
        out: The demo's folder.
        name: Folder of the run in it.
        edit: Kind of the edit.
        count: Number of clips.
        *more: Further options.
    """
    words = ["bench", "run", "toy", "--model", model, "--out", out / name, "--tasks", "v2v", "--edits", edit]
    words += ["--per-task", count, "--examples", 0, *more]
    return Command(tuple(map(str, words)), out / f"{name}.log")


def watch_scores(folder: RunFolder, text: str, count: int, progress: Progress) -> Callable[[], None]:
    """A bar of how many clips have been scored."""
    bar = progress.add_task(text, total=count)
    file = folder.scores("edit_done").file
    return lambda: progress.update(bar, completed=len(file.read_text().splitlines()) if file.is_file() else 0)


def cells(folder: RunFolder) -> dict[str, dict[str, float]]:
    """Mean, interval and count of each metric of a run."""
    return {cell["metric"]: cell for cell in folder.summary()["cells"]}

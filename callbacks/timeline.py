"""Where the time of a training step goes, as the device sees it, without a wait for it."""

import time
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler

SECTIONS = ("data", "forward", "backward", "optimizer", "rest")
OUTSIDE = "outside"
"""Section of what is no part of training, such as validation."""


class Timeline:
    """A row of marks, at each of which another section begins.

    On a GPU a mark is an event in the stream: a section lasts as long as its kernels, and as the device has nothing to
    do meanwhile. Elsewhere it is the time of day.

    Args:
        device: Where training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, section: str) -> None:
        """Begin a section."""
        moment: Any = time.perf_counter()
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._marks.append((section, moment))

    def read(self) -> dict[str, float]:
        """Seconds of each section since the last reading, up to the last mark, for which it waits."""
        found = dict.fromkeys((*SECTIONS, OUTSIDE), 0.0)
        if self._marks and self.device.type == "cuda":
            self._marks[-1][1].synchronize()
        for (section, began), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            found[section] += ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1e3
        del self._marks[:-1]
        return found


class Fetching(Profiler):
    """Marks where a training batch is asked for, of which Lightning tells its profiler alone.

    Args:
        inner: The trainer's own profiler, which is told everything.
        timeline: Takes the marks.
    """

    def __init__(self, inner: Profiler, timeline: Timeline) -> None:
        super().__init__()
        self.inner, self._timeline = inner, timeline

    def start(self, action_name: str) -> None:
        """Begin an action."""
        if action_name.endswith("train_dataloader_next"):
            self._timeline.mark("data")
        self.inner.start(action_name)

    def stop(self, action_name: str) -> None:
        """End an action."""
        self.inner.stop(action_name)

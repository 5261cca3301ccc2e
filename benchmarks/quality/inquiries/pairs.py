"""What questions about edits share: the same moments before and after, and how they are told apart."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.interface import Item
from benchmarks.quality.judging.showing import Encoding, Shown, evenly
from benchmarks.quality.official.base import Clips
from bernini.media import frame_rule, probe_video


def before_after(before: Shown, after: Shown) -> tuple[str | Shown, ...]:
    """A source and an output, each with a word of what it is."""
    return "Before the edit:", before, "After the edit:", after


def moments(
    benchmark: Clips, item: Item, output: Path, indices: Sequence[int], encoding: Encoding, fps: float = 0.0
) -> tuple[Shown, Shown]:
    """Frames of an output, and those that its source shows at the same times.

    Args:
        benchmark: Samples sources.
        item: An edit of a clip.
        output: File of the output.
        indices: Numbers of the output's frames.
        encoding: How they are sent.
        fps: Rate at which they follow each other; 0 for pictures that stand by themselves.

    Raises:
        DataError: The source is damaged.
    """
    source = benchmark.folder / item.extra["videos"][0]
    probed = probe_video(source)
    rule = frame_rule(int(probed["frames"]), probed["fps"], item.expect.fps, benchmark.frames)
    before = tuple(rule.indices[index] for index in indices)
    return Shown(source, before, fps, encoding), Shown(output, tuple(indices), fps, encoding)


def clips(benchmark: Clips, item: Item, output: Path, most: int, encoding: Encoding) -> tuple[Shown, Shown]:
    """A source and an output as clips of the same moments, at most so many, from the first to the last."""
    indices = evenly(item.expect.frames, min(most, item.expect.frames))
    rate = item.expect.fps * len(indices) / item.expect.frames
    return moments(benchmark, item, output, indices, encoding, rate)

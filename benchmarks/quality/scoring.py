"""The stage that scores a benchmark's outputs; it goes on where it was broken off.

Scoring processes import this file, so it needs none of what the models need.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.folder import Row, RunFolder, read_output, reason
from benchmarks.quality.interface import Benchmark, Item, asked
from benchmarks.quality.totals.records import SHARE
from bernini.errors import DataError

CHUNK = 32  # scores that reach the disk together

Scored = dict[str, float | None] | str
"""Scores by name, none where one does not exist for the item; or why there are none at all."""


def score(
    benchmark: Benchmark,
    items: Sequence[Item],
    folder: RunFolder,
    *,
    workers: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Give the outputs of this shard the scores that the benchmark measures itself and that are not there yet.

    Args:
        benchmark: Scores.
        items: All items of the run.
        folder: Where outputs lie and scores go.
        workers: Processes; with 0 or 1 this process does it alone.
        progress: Called with the number of items that are done, or were tried.
    """
    own = asked(folder.shard.of(items), benchmark.measured())
    known = folder.values(benchmark.measured()).keys() | folder.void(benchmark.measured())
    todo = [item for item in own if any((item.id, metric) not in known for metric in item.metrics)]
    done = len(own) - len(todo)
    progress(done)
    with mapping(min(workers, len(todo))) as mapped:
        results = mapped(partial(judge_file, benchmark, folder.root), todo)
        while rows := list(islice(results, CHUNK)):
            append_scores(folder, rows)
            done += len(rows)
            progress(done)


def judge_file(benchmark: Benchmark, root: Path, item: Item) -> tuple[Item, Scored]:
    """Read an output and score it.

    Returns:
        The item and its scores, or why there are none.
    """
    try:
        pixels = read_output(RunFolder(root).output(benchmark, item), item)
        found = benchmark.score(item, pixels)
        return item, {name: within(benchmark, name, found[name]) for name in item.metrics}
    except Exception as error:  # noted: the other items can still be scored
        return item, reason(error)


def within(benchmark: Benchmark, name: str, value: float | None) -> float | None:
    """A score, if it is one that there can be; none where it does not exist for the item.

    Raises:
        DataError: It is out of its range, or is none although it exists for every item.
    """
    allowed = benchmark.ranges.get(name, SHARE)
    if value is None:
        if not allowed.optional:
            raise DataError(f"{name} is none, and exists for every item")
        return None
    if not allowed.low <= value <= allowed.high:  # NaN is caught too
        raise DataError(f"{name} lies in [{allowed.low:g}, {allowed.high:g}], not {value}")
    return float(value)


def append_scores(folder: RunFolder, results: Sequence[tuple[Item, Scored]]) -> None:
    """Note scores, or why there are none."""
    rows: dict[str, list[Row]] = {}
    for item, found in results:
        for metric in item.metrics:
            row = {"failed": found} if isinstance(found, str) else {"value": found[metric]}
            rows.setdefault(metric, []).append({"id": item.id, **row})
    for metric, own in rows.items():
        folder.scores(metric).append(own)


@contextmanager
def mapping(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """``map``, over processes if there are several; they start afresh, since CUDA and threads do not survive a fork."""
    if workers < 2:
        yield map
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield partial(pool.map, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)

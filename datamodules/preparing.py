"""Running a map over samples, shard by shard: in this process, in several, or on a Ray cluster.

A shard is made of a fixed run of the input, and computed with one thread, so that what it holds depends on the input
and the map alone, and not on who made it.
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import torch

from bernini.conversation import Conversation
from bernini.decoding import Limits
from bernini.errors import BerniniError, ConfigError
from bernini.files import write_text
from datamodules.index import index_text
from datamodules.scanning import scan
from datamodules.shards import write_shard
from datamodules.storage import Local, StorageConfig

MADE = ".prepare"
"""Folder beside the shards that says what each finished one holds, until the index does."""
_AGAIN = "run the same command again, which goes on where it stopped; fewer workers need less memory"


class Sample(Protocol):
    """A sample that has been found but not read."""

    @property
    def key(self) -> str:
        """Key it gets."""

    @property
    def where(self) -> str:
        """File and line or row, for errors."""

    @property
    def identity(self) -> str:
        """Text that changes when another sample takes its place."""


Map = Callable[[Any], Conversation]
"""A found sample -> the sample as it is stored. A map is opened on a device, which loads its models."""


@dataclass(frozen=True)
class Job:
    """One shard to make.

    Attributes:
        number: Number of the shard.
        samples: What it is made of.
    """

    number: int
    samples: Sequence[Any]

    @property
    def name(self) -> str:
        """File name of the shard, without its suffix."""
        return f"shard-{self.number:06d}"


@dataclass(frozen=True)
class Making:
    """How shards are made, whoever does.

    Attributes:
        root: Folder of the shards.
        open_map: Device -> the map on it.
        limits: What a clip may cost when it is looked at for the index.
        lossless: Keep the exact pixels of clips.
        skip_bad: Leave bad samples out, in place of stopping at the first.
    """

    root: Path
    open_map: Callable[[str], Map]
    limits: Limits
    lossless: bool = False
    skip_bad: bool = False


class Maker:
    """Makes shards in one process; its map is opened for the first of them.

    Args:
        making: How.
        device: Device that computes.
    """

    def __init__(self, making: Making, device: str) -> None:
        self.making, self.device = making, device

    @cached_property
    def _map(self) -> Map:
        return self.making.open_map(self.device)

    def __call__(self, job: Job) -> BerniniError | None:
        """Write a shard, then what it holds; gives the error that stops the run."""
        making, bad = self.making, list[dict[str, str]]()
        tar = f"{job.name}.tar"
        try:
            with one_thread():
                samples = _good(self._map, job.samples, bad if making.skip_bad else None)
                written = write_shard(making.root / tar, samples, lossless=making.lossless)
            shards = [scan(Local(making.root, StorageConfig()), tar, making.limits)] if written else []
        except BerniniError as error:
            return error
        write_text(making.root / MADE / f"{job.name}.json", json.dumps({"index": index_text(shards), "bad": bad}))
        return None


def _good(make: Map, samples: Sequence[Sample], bad: list[dict[str, str]] | None) -> Iterator[Conversation]:
    """Finished samples; the errors of bad ones go to ``bad`` or, without it, are raised."""
    for sample in samples:
        try:
            made = make(sample)
        except BerniniError as error:
            if bad is None:
                raise
            where = error.where or sample.where
            bad.append({"key": sample.key, "what": error.what, "where": where, "why": error.why})
        else:
            yield made


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on the CPU with one thread, since sums over several come out in other orders."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_processes(making: Making, jobs: Sequence[Job], devices: Sequence[str], workers: int) -> Iterator[Job]:
    """Make shards in worker processes, which share the devices; without workers in this one.

    Yields:
        Jobs that are done.

    Raises:
        BerniniError: The first error of a job, after those at work have ended; or a worker that died.
    """
    if not workers:
        yield from _checked((job, own(job)) for own in [Maker(making, devices[0])] for job in jobs)
        return
    context = multiprocessing.get_context("forkserver")  # CUDA does not survive a fork of this process
    places = context.SimpleQueue()
    for number in range(workers):
        places.put(devices[number % len(devices)])
    with ProcessPoolExecutor(workers, context, _begin, (making, places)) as pool:
        running = {pool.submit(_make, job): job for job in jobs}
        try:
            yield from _checked((running[done], done.result()) for done in as_completed(running))
        except BrokenProcessPool as error:
            what = "a worker process died"
            raise BerniniError(what, why="the system ends processes when memory is short", fix=_AGAIN) from error
        finally:
            pool.shutdown(cancel_futures=True)


_maker: Maker | None = None


def _begin(making: Making, places: Any) -> None:
    global _maker
    _maker = Maker(making, places.get())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, which would wait for its next job for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _make(job: Job) -> BerniniError | None:
    assert _maker is not None
    return _maker(job)


def on_ray(making: Making, jobs: Sequence[Job], workers: int) -> Iterator[Job]:
    """Make shards by Ray Data, each worker with a GPU of its own where the cluster has any.

    The folder, the input and the models lie where every node sees them. The cluster is the one that ``RAY_ADDRESS``
    names or that runs on this machine, else one that is started here.

    Yields:
        Jobs that are done.

    Raises:
        ConfigError: Ray is not installed.
        BerniniError: The first error of a job.
    """
    if not jobs:
        return
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to its makers otherwise
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed", where="--ray", fix="pip install 'bernini[ray]'") from error
    if ours := not ray.is_initialized():
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    rows = ray.data.from_items([{"job": job} for job in jobs], override_num_blocks=len(jobs))
    done = rows.map(
        _RayMaker,  # type: ignore[arg-type]  # a class that is called is made once for each worker
        fn_constructor_args=(making, "cuda" if gpus else "cpu"),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus,
    )
    try:
        yield from _checked((row["job"], row["error"][0]) for row in done.iter_rows())
    finally:
        if ours:
            ray.shutdown()


class _RayMaker:
    def __init__(self, making: Making, device: str) -> None:
        self._make = Maker(making, device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "error": [self._make(row["job"])]}


def _checked(done: Iterable[tuple[Job, BerniniError | None]]) -> Iterator[Job]:
    for job, error in done:
        if error is not None:
            raise error
        yield job

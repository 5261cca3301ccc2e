"""The stage that makes a benchmark's outputs; it goes on where it was broken off."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path

from torch import Tensor

from benchmarks.quality.folder import Row, RunFolder, read_output, reason
from benchmarks.quality.interface import Benchmark, Item
from benchmarks.quality.sampler import Sampler
from bernini.conversation import Conversation
from bernini.errors import CheckpointError, ConfigError, DataError
from bernini.media import write_image, write_video


def generate(
    benchmark: Benchmark,
    items: Sequence[Item],
    sampler: Sampler,
    folder: RunFolder,
    *,
    seed: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Make the outputs of this shard that are not there yet, or are damaged.

    What cannot be made is noted with the reason, and tried again next time.

    Args:
        benchmark: Gives the inputs.
        items: All items of the run.
        sampler: Makes the outputs.
        folder: Where they go.
        seed: The run's seed; every item has its own, which follows from it.
        batch_size: Items of one task that are sampled together.
        progress: Called with the number of items that are done, or were tried.

    Raises:
        ConfigError: The sampler cannot work with its settings.
        CheckpointError: The sampler's weights do not fit.
    """
    own = folder.shard.of(items)
    made = {item.id for item in own if _is_made(folder.output(benchmark, item), item)}
    told = folder.generated.rows()
    # A process that was killed may have written an output and not said so.
    if untold := [item for item in own if item.id in made and "file" not in told.get(item.id, {})]:
        folder.generated.append([_row(benchmark, item, folder, seed) for item in untold])
    todo = [item for item in own if item.id not in made]
    done = len(made)
    progress(done)
    for batch in batches(todo, batch_size):
        folder.generated.append(produce(benchmark, batch, sampler, folder, seed))
        done += len(batch)
        progress(done)


def batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Neighbours of one task, at most ``size`` together."""
    for _, same in groupby(items, key=lambda item: item.task):
        while batch := list(islice(same, size)):
            yield batch


def produce(benchmark: Benchmark, items: Sequence[Item], sampler: Sampler, folder: RunFolder, seed: int) -> list[Row]:
    """Make one batch of outputs.

    Returns:
        A row for each item: its file and seed, or ``failed`` with the reason.
    """
    ready: list[tuple[Item, Conversation]] = []
    rows: list[Row] = []
    for item in items:
        try:
            ready.append((item, benchmark.conversation(item)))
        except Exception as error:  # any reason is one to note: the other items can still be made
            rows.append({"id": item.id, "failed": reason(error)})
    seeds = [item.seed(seed) for item, _ in ready]
    try:
        made = sampler([conversation for _, conversation in ready], seeds) if ready else []
    except (CheckpointError, ConfigError):
        raise  # it would be the same for every batch
    except Exception as error:
        return rows + [{"id": item.id, "failed": reason(error)} for item, _ in ready]
    for (item, _), pixels in zip(ready, made, strict=True):
        path = folder.output(benchmark, item)
        try:
            _write(path, pixels, item)
        except Exception as error:
            rows.append({"id": item.id, "failed": reason(error)})
        else:
            rows.append(_row(benchmark, item, folder, seed))
    return rows


def _row(benchmark: Benchmark, item: Item, folder: RunFolder, seed: int) -> Row:
    path = folder.output(benchmark, item)
    return {"id": item.id, "file": str(path.relative_to(folder.root)), "seed": item.seed(seed)}


def _is_made(path: Path, item: Item) -> bool:
    try:
        read_output(path, item)
    except DataError:
        return False
    return True


def _write(path: Path, pixels: Tensor, item: Item) -> None:
    expect = item.expect
    if tuple(pixels.shape[1:]) != (expect.frames, expect.height, expect.width):
        raise DataError(f"the sampler made {tuple(pixels.shape)}", where=item.id, why=f"expected {expect}")
    if path.suffix == ".mp4":
        write_video(path, pixels, expect.fps)
    else:
        write_image(path, pixels)

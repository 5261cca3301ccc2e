"""The part of the stage `score` that takes models; it goes on where it was broken off, one model after the other."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.quality.folder import MODELS, Row, RunFolder, read_output, reason
from benchmarks.quality.interface import Benchmark, Item
from benchmarks.quality.models.base import Measure
from benchmarks.quality.models.registry import MEASURES
from benchmarks.quality.official.base import OfficialBenchmark
from benchmarks.quality.official.needs import Places, Weights
from benchmarks.quality.scoring import CHUNK, within
from bernini.errors import ConfigError, DataError
from bernini.files import hash_files, replacing

FILES = (".json", ".txt", ".safetensors", ".bin")  # of a folder of weights that decide what a model computes


class Group(NamedTuple):
    """Scores that one model gives.

    Attributes:
        measures: The scores by name.
        weights: What the model is made of.
        places: Where that lies.
    """

    measures: dict[str, Measure]
    weights: tuple[Weights, ...]
    places: tuple[Path, ...]


def groups(benchmark: Benchmark, places: Places) -> list[Group]:
    """The scores of a benchmark whose weights are all there, model by model."""
    found: dict[tuple[Any, ...], Group] = {}
    for name, measure in MEASURES.get(benchmark.name, {}).items():
        weights = weights_of(benchmark, name)
        lying = tuple(place for one in weights if (place := places.find(one)))
        if len(lying) == len(weights):
            group = found.setdefault((measure.model, weights), Group({}, weights, lying))
            group.measures[name] = measure
    return list(found.values())


def weights_of(benchmark: Benchmark, score: str) -> tuple[Weights, ...]:
    """Weights of a score's model, in the order in which it takes them."""
    assert isinstance(benchmark, OfficialBenchmark)
    return tuple(need for need in benchmark.needs[score] if isinstance(need, Weights))


def score_by_model(
    benchmark: Benchmark,
    items: Sequence[Item],
    folder: RunFolder,
    group: Group,
    *,
    device: torch.device,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Give the outputs of this shard the scores of one model that are not there yet, or note why there are none.

    Args:
        benchmark: What was run.
        items: All items of the run.
        folder: Where outputs lie and scores go.
        group: The model and its scores.
        device: Where the model computes.
        progress: Called with the number of items that are done, or were tried.

    Raises:
        CheckpointError: The weights cannot be read.
        ConfigError: The run has scores by other weights.
    """
    told = {name: _facts(group) for name in group.measures}
    check(folder, told)
    known = {name: folder.scores(name).rows() for name in group.measures}
    own = folder.shard.of(items)
    lacking = {
        item.id: [name for name in known if name in item.metrics and "value" not in known[name].get(item.id, {})]
        for item in own
    }
    todo = [item for item in own if lacking[item.id]]
    done = len(own) - len(todo)
    progress(done)
    if not todo:
        return
    assert isinstance(benchmark, OfficialBenchmark)
    measure = next(iter(group.measures.values()))
    model = measure.model(group.places, device)
    with replacing(folder.root / MODELS) as temporary:
        temporary.write_text(json.dumps({**folder.models(), **told}, indent=2) + "\n")
    results: Iterator[tuple[Item, dict[str, Row]]] = (
        (item, _measure(benchmark, item, folder, group, lacking[item.id], model)) for item in todo
    )
    while rows := list(islice(results, CHUNK)):
        for name in group.measures:
            if new := [{"id": item.id, **found[name]} for item, found in rows if name in found]:
                folder.scores(name).append(new)
        done += len(rows)
        progress(done)


def check(folder: RunFolder, told: Mapping[str, Any]) -> None:
    """See that scores were measured with the same weights before, if they were.

    Raises:
        ConfigError: They were measured with others.
    """
    before = folder.models()
    if differ := sorted(name for name in before.keys() & told.keys() if before[name] != told[name]):
        raise ConfigError(
            f"the run has {differ[0]} by other weights",
            where=str(folder.root / MODELS),
            why=f"{before[differ[0]]} there and {told[differ[0]]} here",
            fix=f"give those, or delete scores/{differ[0]}.jsonl and what {MODELS} says of it",
        )


def _facts(group: Group) -> dict[str, Any]:
    return {"weights": {one.name: _hash(place) for one, place in zip(group.weights, group.places, strict=True)}}


def _hash(place: Path) -> str:
    files = [place] if place.is_file() else sorted(file for file in place.iterdir() if file.suffix in FILES)
    return hash_files(files)[:16]


def _measure(
    benchmark: OfficialBenchmark, item: Item, folder: RunFolder, group: Group, asked: Sequence[str], model: Any
) -> dict[str, Row]:
    """A row for each score that is asked for, without the item's id."""
    try:
        pixels = read_output(folder.output(benchmark, item), item)
    except DataError as error:
        return {name: {"failed": reason(error)} for name in asked}
    rows: dict[str, Row] = {}
    for name in asked:
        try:
            value = group.measures[name].score(model, benchmark, item, pixels)
            rows[name] = {"value": within(benchmark, name, value)}
        except Exception as error:  # noted: the other items can still be scored
            rows[name] = {"failed": reason(error)}
    return rows

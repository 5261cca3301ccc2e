"""The weights that the options of `bernini bench` name, and those that it fetches when it is told to."""

from argparse import Namespace
from pathlib import Path

from benchmarks.quality.interface import Benchmark
from benchmarks.quality.model_scoring import weights_of
from benchmarks.quality.models.registry import MEASURES
from benchmarks.quality.official.needs import Places, Weights
from bernini.errors import ConfigError, ServiceError
from bernini.suggest import closest


def places_of(options: Namespace, benchmark: Benchmark) -> Places:
    """Where weights lie.

    Raises:
        ConfigError: A path does not exist, or a name is of no weights of the benchmark.
        ServiceError: Weights were to be fetched, and could not.
    """
    named = {name: path for name, path in options.weights if name}
    places = Places(named, tuple(path for name, path in options.weights if not name))
    for path in (*named.values(), *places.folders):
        if not path.exists():
            raise ConfigError(f"there are no weights {path}", where="--weights", why="the path does not exist")
    known = {weights.name for weights in wanted(benchmark)}
    if unknown := sorted(named.keys() - known):
        raise ConfigError(
            f"{benchmark.name} is not measured with {unknown[0]!r} here",
            where="--weights",
            why=f"it is with {', '.join(sorted(known)) or 'no weights'}",
            fix=closest(unknown[0], known),
        )
    if getattr(options, "download_weights", False):
        for weights in wanted(benchmark):
            if places.find(weights) is None:
                fetch(weights)
    return places


def wanted(benchmark: Benchmark) -> list[Weights]:
    """Weights that models take which measure a benchmark."""
    return list(dict.fromkeys(w for name in MEASURES.get(benchmark.name, {}) for w in weights_of(benchmark, name)))


def fetch(weights: Weights) -> Path | None:
    """Fetch weights into the hub's cache; none if they do not lie on the hub.

    Raises:
        ServiceError: The hub does not give them.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    patterns = ["*.json", "*.txt", *([] if weights.processor else ["model*.safetensors"])]
    try:
        if not weights.origin:
            return Path(snapshot_download(weights.name, revision=weights.revision, allow_patterns=patterns))
        if weights.repository:
            return Path(hf_hub_download(weights.repository, weights.name, revision=weights.revision))
    except (OSError, ValueError) as error:  # huggingface_hub's own are among these
        raise ServiceError(
            f"{weights} cannot be fetched",
            where="--download-weights",
            why=f"{type(error).__name__}: {error}".splitlines()[0],
            fix=f"fetch them elsewhere, and give --weights {weights.name}=PATH",
        ) from error
    return None

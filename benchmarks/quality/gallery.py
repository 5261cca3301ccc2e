"""Which items a report shows, and what was said about them."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from benchmarks.quality.folder import ANSWERS, RunFolder, reason
from benchmarks.quality.interface import Benchmark, Item, asked, subset, without
from benchmarks.quality.judging.answers import answered
from benchmarks.quality.tables import write_inputs
from bernini.errors import DataError
from bernini.media import fit_size, read_image, read_video, resize, write_image, write_video
from bernini.report import Case

EXAMPLES = "examples"
EDGE = 384  # pixels of the longest edge that a page embeds


def standings(
    items: Sequence[Item], values: Mapping[tuple[str, str], float], lower: Collection[str]
) -> dict[str, float]:
    """How each item does among those of its task, in [0, 1]: the mean, over its scores, of the share that is worse.

    Scores of any range count alike; equal ones are half worse. Items without a score have no standing.

    Args:
        items: The items.
        values: Score by item id and name.
        lower: Scores that are better the lower they are.
    """
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item in items:
        for metric in item.metrics:
            if (item.id, metric) in values:
                alike[item.task, metric].append(item.id)
    shares: dict[str, list[float]] = defaultdict(list)
    for (_, metric), ids in alike.items():
        found = sorted(values[one, metric] for one in ids)
        for one in ids:
            value = values[one, metric]
            below = (bisect_left(found, value) + bisect_right(found, value)) / 2 / len(found)
            shares[one].append(1 - below if metric in lower else below)
    return {one: sum(own) / len(own) for one, own in shares.items()}


def choose(
    items: Sequence[Item], values: Mapping[tuple[str, str], float], lower: Collection[str], count: int
) -> dict[str, list[Item]]:
    """Items to show: a quarter each of the worst, the best and those that lack a score; random ones fill up.

    An item that does as well as the others of its task is neither good nor bad.

    Args:
        items: Items with outputs, asked for the scores that the run gives.
        values: Score by item id and name.
        lower: Scores that are better the lower they are.
        count: How many at most.
    """
    lacking = {item.id for item in items for metric in item.metrics if (item.id, metric) not in values}
    whole = [item for item in items if item.id not in lacking]
    rank = standings(whole, values, lower)
    ranked = sorted((item for item in whole if item.id in rank), key=lambda item: (rank[item.id], item.id))
    found = {
        "worst": [item for item in ranked if rank[item.id] < 0.5][: count // 4],
        "best": [item for item in reversed(ranked) if rank[item.id] > 0.5][: count // 4],
        "score missing": subset([item for item in items if item.id in lacking], count // 4),
    }
    seen = {item.id for own in found.values() for item in own}
    found["random"] = subset([item for item in items if item.id not in seen], count - len(seen))
    return found


def gallery(benchmark: Benchmark, items: Sequence[Item], folder: RunFolder, count: int) -> list[Case]:
    """Items as a report shows them: clips, scores, reasons where there are none, and answers of the judge.

    Args:
        benchmark: Gives the inputs.
        items: All items of the run.
        folder: The run.
        count: How many to show, see `choose`.
    """
    scored = folder.scored(benchmark)
    own = without(asked(items, scored), folder.void(scored))
    made = [item for item in own if folder.output(benchmark, item).is_file()]
    rows = {metric: folder.scores(metric).rows() for metric in scored}
    said = answered(folder.root / ANSWERS)
    cases = []
    for chosen, own in choose(made, folder.values(scored), benchmark.lower_is_better, count).items():
        for item in own:
            found = {metric: rows[metric].get(item.id, {"failed": "not scored yet"}) for metric in item.metrics}
            missing = {metric: row["failed"] for metric, row in found.items() if "failed" in row}
            notes = [
                *((f"why there is no {metric.replace('_', ' ')}", why) for metric, why in missing.items()),
                *((f"judge's answer: {asking}", text) for asking, text in said.get(item.id, ())),
            ]
            clips = [
                shrunk(*file, folder.root / EXAMPLES) for file in write_inputs(benchmark, item, folder.root / EXAMPLES)
            ]
            try:
                clips.append(shrunk("output", folder.output(benchmark, item), folder.root / EXAMPLES))
            except DataError as error:
                notes.insert(0, ("why no output is shown", reason(error)))
            facets = {"shown as": chosen, "task": item.task, "category": item.category}
            cases.append(
                Case(
                    title=item.id,
                    instruction=item.prompt,
                    clips=clips,
                    scores={metric.replace("_", " "): row.get("value", "none") for metric, row in found.items()},
                    facets={name: value for name, value in facets.items() if value},
                    notes=notes,
                )
            )
    return cases


def shrunk(label: str, path: Path, folder: Path) -> tuple[str, Path]:
    """A file that is small enough to be embedded, and its label: a copy in ``folder`` unless it is so itself."""
    video = path.suffix == ".mp4"
    media = read_video(path) if video else read_image(path)
    assert media.pixels is not None
    height, width = media.pixels.shape[2:]
    if max(height, width) <= EDGE:
        return label, path
    copy = folder / f"{path.stem}-shrunk{path.suffix}"
    if not copy.is_file() or copy.stat().st_mtime_ns < path.stat().st_mtime_ns:
        pixels = resize(media.pixels, *fit_size(height, width, max_edge=EDGE))[:, : int(media.source["sampled"])]
        if video:
            write_video(copy, pixels, media.fps)
        else:
            write_image(copy, pixels)
    return f"{label}, {width}×{height} made smaller", copy  # noqa: RUF001

"""From the records of all runs to a page of tables; every figure and every verdict is computed from the records."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality import bootstrap
from benchmarks.quality.bootstrap import DRAWS, Estimate, Floats, mean_of
from benchmarks.quality.environment import machines
from benchmarks.quality.rope_study.items import BEYOND, COMPARED, TRAINED
from benchmarks.quality.tables import markdown
from benchmarks.quality.toy import ToyBenchmark
from bernini.errors import DataError

Bools = NDArray[np.bool_]
Cell = tuple[str, int, str]
"""Encoding, number of references, numbering."""

ENCODINGS = {"sa3d": "SA-3D RoPE", "plain": "plain 3D RoPE", "embedding": "learned embedding"}
METRICS = {
    "in_place": "what stands at the named place has the shape, colour and texture of the named image",
    "identity": "the verifier's `identity`: the same, wherever the things stand",
    "attributes": "the verifier's `attributes`: looks, size, place, background, light",
    "motion": "the verifier's `motion`: things that move as the text says",
    "copied": "things that look like one of the images, whichever",
}
GUIDANCE: float = ToyBenchmark.defaults["guidance"][False][1]["txt"]


def estimate(values: Floats) -> Estimate:
    """Mean over seeds and items, ``[seeds, items]``."""
    return bootstrap.estimate([mean_of(row) for row in values], values.shape[1])


class Records:
    """Scores of all runs.

    Args:
        folder: Folder of the study.

    Raises:
        DataError: Nothing has been scored, or the encodings were not given the same seeds and items.
    """

    def __init__(self, folder: Path) -> None:
        vae = folder / "vae.json"
        if not vae.is_file():
            raise DataError("the study has no bounds", where=str(vae), fix="run its `bounds` command first")
        self.vae = json.loads(vae.read_text())
        files = sorted(file for file in folder.glob("*.json") if file != vae)
        self.runs: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]
        self.seeds = {e: sorted(run["seed"] for run in self.runs if run["encoding"] == e) for e in ENCODINGS}
        if not self.runs or len({tuple(seeds) for seeds in self.seeds.values()}) > 1:
            given = "; ".join(f"{encoding}: {seeds}" for encoding, seeds in self.seeds.items())
            raise DataError(
                "the encodings cannot be compared",
                where=str(folder),
                why=f"their seeds differ ({given})",
                fix="train and score every encoding from the same seeds",
            )
        for name in ("recipe", "sampling_steps"):
            if any(run[name] != self.runs[0][name] for run in self.runs):
                raise DataError(f"the runs differ in {name}", where=str(folder), fix="train and score them all alike")
        self._cells: dict[Cell, list[list[dict[str, Any]]]] = defaultdict(list)
        for run in sorted([self.vae, *self.runs], key=lambda run: run.get("seed", 0)):
            rows: dict[Cell, list[dict[str, Any]]] = defaultdict(list)
            for record in run["records"]:
                rows[run["encoding"], record["references"], record["numbering"]].append(record)
            for cell, found in rows.items():
                self._cells[cell].append(found)
        for cell, kept in self._cells.items():
            keys = {tuple(r["key"] for r in rows) for rows in [*kept, *self._cells["vae", cell[1], "integer"]]}
            if len(keys) > 1 or any(run["data"] != self.vae["data"] for run in self.runs):
                raise DataError(
                    f"runs of {cell[0]} were scored on other items than the VAE",
                    where=str(folder),
                    fix="score all of them again",
                )

    def has(self, cell: Cell) -> bool:
        """Whether anything was scored there."""
        return cell in self._cells

    def values(self, cell: Cell, metric: str) -> Floats:
        """``[seeds, items]``."""
        return np.array([[record[metric] for record in rows] for rows in self._cells[cell]], dtype=np.float64)

    def early(self, references: int) -> Bools:
        """Which items name none but the images whose numbers were trained, ``[items]``."""
        (rows,) = self._cells["vae", references, "integer"]
        return np.array([max(record["named"]) < max(TRAINED) for record in rows])


def _compared(records: Records, metric: str) -> str:
    """Encodings by number of references, all of which were trained."""
    rows = [
        [name, *(estimate(records.values((encoding, k, "integer"), metric)).text() for k in COMPARED)]
        for encoding, name in ENCODINGS.items()
    ]
    if metric == "in_place":
        rows.append(["any image alike", *(_bound(records, k, "chance") for k in COMPARED)])
    rows.append(["true target through the VAE", *(_bound(records, k, metric) for k in COMPARED)])
    return markdown(["", *_columns(COMPARED)], rows)


def _bound(records: Records, references: int, metric: str) -> str:
    return f"{100 * records.values(('vae', references, 'integer'), metric).mean():.1f}"


def _columns(counts: Sequence[int]) -> list[str]:
    return [f"{k} image{'s' if k > 1 else ''}" for k in counts]


def _differences(records: Records) -> tuple[str, list[str]]:
    """SA-3D RoPE less the others, and what that comes to in words."""
    rows, words = [], []
    for encoding, name in ENCODINGS.items():
        if encoding == "sa3d":
            continue
        gaps = [
            estimate(records.values(("sa3d", k, "integer"), "in_place"))
            - estimate(records.values((encoding, k, "integer"), "in_place"))
            for k in COMPARED
        ]
        rows.append([f"SA-3D RoPE less {name}", *(gap.text("+") for gap in gaps)])
        words.append(f"SA-3D RoPE against {name}: " + _verdicts(gaps, COMPARED))
    return markdown(["", *_columns(COMPARED)], rows), words


def _verdicts(gaps: Sequence[Estimate], counts: Sequence[int]) -> str:
    columns = _columns(counts)
    return "; ".join(f"{gap.verdict} with {column}" for gap, column in zip(gaps, columns, strict=True)) + "."


def _beyond(records: Records, metric: str, keep: Callable[[int], Bools] | None = None) -> str:
    """Encodings and numberings by number of references, more than were trained."""
    rows = []
    for encoding, name in ENCODINGS.items():
        for numbering in ("fractional", "integer"):
            if not records.has((encoding, BEYOND[0], numbering)):
                continue
            cells = []
            for k in BEYOND:
                values = records.values((encoding, k, numbering), metric)
                values = values if keep is None else values[:, keep(k)]
                cells.append(estimate(values).text() if values.size else "no item")
            rows.append([name, "blind to ids" if encoding == "plain" else numbering, *cells])
    if metric == "in_place" and keep is None:
        rows.append(["any image alike", "", *(_bound(records, k, "chance") for k in BEYOND)])
        rows.append(["true target through the VAE", "", *(_bound(records, k, metric) for k in BEYOND)])
    return markdown(["", "ids", *_columns(BEYOND)], rows)


def _numberings(records: Records) -> list[str]:
    """Fractional against integer ids in words."""
    words = []
    for encoding in ("sa3d", "embedding"):
        for metric in ("in_place", "copied"):
            gaps = [
                estimate(records.values((encoding, k, "fractional"), metric))
                - estimate(records.values((encoding, k, "integer"), metric))
                for k in BEYOND
            ]
            name = f"{ENCODINGS[encoding]}, fractional against integer ids, by `{metric}`: "
            words.append(name + _verdicts(gaps, BEYOND))
    return words


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _training(records: Records) -> str:
    rows = []
    for encoding, name in ENCODINGS.items():
        runs = sorted((run for run in records.runs if run["encoding"] == encoding), key=lambda run: run["seed"])
        losses = ", ".join(f"{run['loss']:.4f}" for run in runs)
        rows.append([name, f"{runs[0]['parameters']:,}", losses])
    return markdown(["", "parameters", "last logged loss of each seed"], rows)


def _scored(records: Records) -> list[tuple[str, dict[str, str]]]:
    return [(f"{ENCODINGS[run['encoding']]} {run['seed']}", run["environment"]) for run in records.runs]


def _commands(records: Records) -> str:
    data, run = records.vae["data"], records.runs[0]
    recipe, program = run["recipe"], "python -m benchmarks.quality.rope_study"
    seeds = " ".join(map(str, records.seeds["sa3d"]))
    schedule = "--model.init_args.lr_scheduler.init_args"
    return "\n".join(
        [
            f"for seed in {seeds}; do for encoding in {' '.join(ENCODINGS)}; do",
            "  RUN=runs/rope/$encoding-$seed bernini fit -c configs/toy/rope.yaml --seed_everything $seed \\",
            "    --data.file runs/rope/bank-$seed.safetensors \\",
            "    --model.init_args.architecture.segment_encoding $encoding \\",
            f"    --trainer.max_steps {recipe['steps']} {schedule}.total_steps {recipe['steps']} \\",
            f"    {schedule}.max_lr {recipe['lr']:g} --data.tasks '{{r2v: {recipe['batch']}}}' \\",
            f"    --data.length {recipe['samples']} --data.frames {data['frames']} --data.height {data['height']} "
            f"--data.width {data['width']}",
            "done; done",
            f"{program} bounds --held-out {data['held_out']} --frames {data['frames']} --size {data['height']}",
            f"{program} score runs/rope/*-[0-9] --held-out {data['held_out']} --steps {run['sampling_steps']}",
            f"{program} table",
        ]
    )


def page(records: Records) -> str:
    """The page, in Markdown."""
    data, run = records.vae["data"], records.runs[0]
    recipe = run["recipe"]
    differences, verdicts = _differences(records)
    early = cast(Callable[[int], Bools], records.early)
    seeds, last = len(records.seeds["sa3d"]), max(TRAINED)
    return f"""# Telling sources apart

SA-3D RoPE against plain 3D RoPE, which does not see source ids, and against plain 3D RoPE with a learned vector per
source id. Small renderers of the toy world make clips of things that reference images show; the text calls a thing
"the thing of image3" and says where it is and how it moves, nothing of its looks. The other images are distractors.
The runs of one seed had the same samples in the same order, the same noise and, but for the learned vectors, the same
weights to start from. Clips are sampled with text guidance {GUIDANCE:g} (1 is none).

Figures are percentages, means over the held-out items ({data["held_out"]} for each number of images) and over
{seeds} seed(s), with 95 % intervals from {DRAWS:,} bootstrap draws of seeds and items, paired where two are compared.
Few seeds make for rough intervals. "Any image alike" is what comes of taking any of the images for each thing.

## One to four sources

{_bullets(verdicts)}

In place: {METRICS["in_place"]}.

{_compared(records, "in_place")}

{differences}

{_others(records)}

## Ids beyond the trained {last}

Training has 1 to {last} images. *Fractional* ids are squeezed into 1..{last}, as in the released sampler; *integer* ids
go on with {last + 1}, {last + 2}, ... No training text names an image after image{last - 1}, and a fractional id is not
the one that was trained with the image's number: hence the split by which images a text names.

{_bullets(_numberings(records))}

In place, all items:

{_beyond(records, "in_place")}

In place, items that name none but image0 to image{last - 1}:

{_beyond(records, "in_place", early)}

In place, items that name an image after these:

{_beyond(records, "in_place", lambda k: ~early(k))}

Copied: {METRICS["copied"]}.

{_beyond(records, "copied")}

## How it was made

{recipe["steps"]:,} steps of {recipe["batch"]} samples; every batch holds all numbers of images. Each seed has
{recipe["samples"]:,} samples of its own, with 1 to {last} images at random. Clips of {data["frames"]} frames of
{data["width"]} x {data["height"]} pixels; AdamW with a peak learning rate of {recipe["lr"]:g}; a moving average of the
weights is scored, with {run["sampling_steps"]} steps of UniPC. Scored on:

{_bullets(machines(_scored(records)))}

{_training(records)}

```
{_commands(records)}
```
"""


def _others(records: Records) -> str:
    """Tables of the verifier's own scores."""
    names = ("identity", "attributes", "motion")
    return "\n\n".join(f"{name.capitalize()}: {METRICS[name]}.\n\n{_compared(records, name)}" for name in names)

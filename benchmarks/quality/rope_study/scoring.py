"""Sampling the held-out items with a run's renderer, one record per item and numbering of its sources."""

import csv
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quality.environment import environment
from benchmarks.quality.rope_study.items import (
    BEYOND,
    COMPARED,
    NUMBERINGS,
    TASK,
    Clips,
    Record,
    held_out,
    read_output,
    settings,
)
from benchmarks.quality.sampler import Ceiling, Model, Sampler, load_sampler
from benchmarks.quality.studies import reading_run
from benchmarks.quality.toy import ToyBenchmark
from bernini.conversation import Conversation
from bernini.flow.guidance import Omegas
from bernini.renderer.sampling import SamplingConfig
from bernini.vae.codec import LatentCodec

ASSETS = Path(__file__).parents[3] / "assets" / "toy"


@dataclass(frozen=True)
class Run:
    """What a run's folder tells of its training.

    Attributes:
        folder: The run's folder, with ``transformer/``.
        encoding: How sources are told apart.
        seed: Of samples, weights and noise.
        rows: Context rows of a text.
        clips: Size of the clips.
        recipe: ``steps``, ``batch``, ``lr`` (its peak) and ``samples``.
        loss: The last mean loss that was logged.
    """

    folder: Path
    encoding: str
    seed: int
    rows: int
    clips: Clips
    recipe: dict[str, float]
    loss: float

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read ``config.yaml`` and the metrics.

        Raises:
            DataError: A file is missing, or of something else.
        """
        with reading_run(folder, "configs/toy/rope.yaml") as config:
            model, data = config["model"]["init_args"], config["data"]["init_args"]
            with (folder / "logs" / "metrics.csv").open() as file:
                losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
            return cls(
                folder,
                model["architecture"]["segment_encoding"],
                config["seed_everything"],
                model["text"]["rows"],
                Clips(data["frames"], data["height"], data["width"]),
                {
                    "steps": config["trainer"]["max_steps"],
                    "batch": data["tasks"][TASK],
                    "lr": model["lr_scheduler"]["init_args"]["max_lr"],
                    "samples": data["length"],
                },
                losses[-1],
            )


def _read_array(item: Conversation, output: NDArray[np.uint8]) -> Record:
    return read_output(item, torch.from_numpy(output))


@dataclass(frozen=True)
class Scorer:
    """Scores held-out items.

    Attributes:
        items: Items of each number of references.
        batch: Items that are sampled at once.
        device: Of the models.
        mapped: Maps over outputs to be read, as ``map`` does.
    """

    items: int
    batch: int
    device: torch.device
    mapped: Callable[..., Iterator[Any]]

    def bounds(self, clips: Clips) -> dict[str, Any]:
        """Scores of the true targets, which went through the VAE alone."""
        ceiling = Ceiling(LatentCodec.from_pretrained(ASSETS / "vae").to(self.device))
        records = [self._records("vae", ceiling, clips, count, "integer") for count in (*COMPARED, *BEYOND)]
        return {"encoding": "vae", **self._facts(clips), "records": [*chain.from_iterable(records)]}

    def run(self, run: Run, steps: int) -> dict[str, Any]:
        """Scores of a trained renderer.

        Args:
            run: The run.
            steps: Solver steps.
        """
        records: list[Record] = []
        sampler = self._sampler(run, steps)
        for count, numbering in settings(run.encoding):
            sampler.sampling = replace(sampler.sampling, beyond_trained=NUMBERINGS[numbering])
            records += self._records(run.folder.name, sampler, run.clips, count, numbering)
        facts = {"encoding": run.encoding, "seed": run.seed, "recipe": run.recipe, "loss": run.loss}
        parameters = sum(p.numel() for p in sampler.renderer.experts.parameters())
        facts |= {"parameters": parameters, "sampling_steps": steps, **self._facts(run.clips)}
        return {**facts, "environment": environment(), "records": records}

    def _facts(self, clips: Clips) -> dict[str, Any]:
        return {"data": {**asdict(clips), "held_out": self.items}}

    def _sampler(self, run: Run, steps: int) -> Model:
        mode, omega = ToyBenchmark.defaults["guidance"][False]
        config = SamplingConfig(
            steps=steps,
            mode=mode,
            omegas=Omegas(**omega),
            max_pack=2 * self.batch,  # with and without text
        )
        return load_sampler(
            run.folder,
            lora=None,
            vae=ASSETS,
            text=ASSETS,
            rows=run.rows,
            config=config,
            dtype="float32",
            device=self.device,
        )

    def _records(self, name: str, sampler: Sampler, clips: Clips, count: int, numbering: str) -> list[Record]:
        """Records of one number of references; an item's noise depends on its own number alone."""
        started, found = time.monotonic(), []
        for first in range(0, self.items, self.batch):
            numbers = range(first, min(first + self.batch, self.items))
            items = [held_out(clips, count, number) for number in numbers]
            outputs = [pixels.numpy() for pixels in sampler(items, numbers)]
            told = [Conversation(TASK, [], key=item.key, info=item.info) for item in items]
            found.append(self.mapped(_read_array, told, outputs))
        records = [{"references": count, "numbering": numbering, **r} for r in chain.from_iterable(found)]
        in_place = 100 * sum(r["in_place"] for r in records) / len(records)
        seconds = time.monotonic() - started
        print(f"{name}: {count} images, {numbering} ids: {in_place:.1f} % in place, {seconds:.1f} s", flush=True)
        return records


def write_scores(path: Path, scores: dict[str, Any]) -> None:
    """Write what `Scorer` made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(scores) + "\n")

"""Rendering held-out samples with every plan and every way to think, one file of records a run and category."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.cotraining_study.items import Record, bare, read_output
from benchmarks.quality.cotraining_study.runs import Run, hash_weights
from benchmarks.quality.environment import environment
from benchmarks.quality.plans.exam import ANSWERED, PLANNED, Exam, Sheets
from benchmarks.quality.plans.measuring import Truth, answer, measure
from bernini.conversation import Conversation
from bernini.errors import ConfigError
from bernini.files import replacing
from bernini.planner.conversations import ConversationPlanner
from bernini.planner.cot import WritingConfig, rewrite
from bernini.planner.planning import Plan, PlanningConfig
from bernini.reasoning import by_frame
from bernini.renderer.experts import Experts
from bernini.renderer.frozen import Frozen, TextConfig
from bernini.renderer.rendering import Renderer
from bernini.renderer.sampling import SamplingConfig
from bernini.seeds import draw_seed
from bernini.text.encoder import context_rows

PARTS = (*PLANNED, *ANSWERED)
REASONING = ("i2i/reason", "v2v/reason")
NEEDED = (*REASONING, *ANSWERED)
"""Parts that every table has."""
WITHOUT = "v2v"
"""Guidance mode without a plan: text, and all sources in every arm."""

USUAL = PlanningConfig()
WRITING = WritingConfig(max_tokens=128)  # the longest reasoning of the toy world has 42


@dataclass(frozen=True)
class Settings:
    """What decides the scores of a run.

    Attributes:
        exam: Held-out samples.
        sampling: How they are rendered with a plan; without one, the mode is `WITHOUT`.
    """

    exam: Exam
    sampling: SamplingConfig

    def told(self) -> dict[str, Any]:
        """The same as plain JSON."""
        sampling = {name: getattr(self.sampling, name) for name in ("steps", "shift", "solver", "mode")}
        guidance = {"without": WITHOUT, "omegas": asdict(self.sampling.omegas)}
        writing, planning = asdict(WRITING), asdict(USUAL)
        return {"exam": asdict(self.exam), "sampling": {**sampling, **guidance}, "planning": planning, "text": writing}


class Model:
    """Planner and renderer of a run at work.

    Args:
        run: The run.
        family: Folder with the VAE and the text encoder, and the renderer of a planner that was trained alone.
        sampling: How to render with a plan.
        device: Where to compute.

    Raises:
        CheckpointError: A part is missing or does not fit.
    """

    def __init__(self, run: Run, family: Path, sampling: SamplingConfig, device: torch.device) -> None:
        self.device, self.sampling = device, sampling
        self.planner = ConversationPlanner.from_pretrained(run.weights).to(device)
        experts = Experts.from_pretrained(family if run.variant == "before" else run.weights).to(device)
        rows = context_rows(family)
        frozen = Frozen(str(family), TextConfig(str(family), rows=rows), torch.float32)
        self.renderer = Renderer(experts, frozen.codec(device), frozen.features(device), rows)

    def plan(self, items: Sequence[Conversation], seeds: Sequence[int]) -> list[Plan]:
        """Predict plans."""
        return self.planner(items, seeds, USUAL, [self.renderer.target_size(item, self.sampling) for item in items])

    def adopt(self, items: Sequence[Conversation], embeds: Sequence[Tensor]) -> list[Plan]:
        """Plans of given embeddings ``[N, D]``."""
        return self.planner.adopt(items, embeds, [self.renderer.target_size(item, self.sampling) for item in items])

    def render(self, items: Sequence[Conversation], seeds: Sequence[int], plans: Sequence[Plan] | None) -> list[Tensor]:
        """Render ``[3, T, H, W]`` uint8, on the CPU."""
        sampling = self.sampling if plans is not None else replace(self.sampling, mode=WITHOUT)
        shown = [item.to(self.device) for item in items]
        return [pixels.cpu() for pixels in self.renderer(shown, sampling, seeds, plans)]

    def make(self, items: Sequence[Conversation], seeds: Sequence[int]) -> list[Tensor]:
        """Plan, then render."""
        return self.render(items, seeds, self.plan(items, seeds))

    def think(self, items: Sequence[Conversation]) -> list[Conversation]:
        """Put what the planner concludes in the place of instructions."""
        return rewrite(self.planner.model, self.planner.template, items, WRITING)


class Scorer:
    """Scores runs; those with one vision tower share what it makes of the targets, and the probes.

    Args:
        settings: What is scored, and how.
        family: See `Model`.
        out: Folder of the scores.
        batch: Samples at once.
        parts: Categories to render, and questions to ask, of `PARTS`.
        device: Of the models.
        workers: Processes that draw what probes learn from.
        mapped: Maps over outputs to be read, as ``map`` does.
        say: Told of progress.
    """

    def __init__(
        self,
        settings: Settings,
        family: Path,
        out: Path,
        batch: int,
        parts: Sequence[str],
        device: torch.device,
        workers: int,
        mapped: Callable[..., Iterator[Any]],
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.family, self.out, self.batch, self.parts = settings, family, out, batch, parts
        self.device, self.workers, self.mapped, self.say = device, workers, mapped, say
        self.items = lru_cache(maxsize=None)(settings.exam.held_out)
        self._truth: Truth | None = None

    def score(self, run: Run) -> None:
        """Score what has no scores yet.

        Raises:
            CheckpointError: A part of the model is missing or does not fit.
            ConfigError: There are scores of other weights, or with other settings.
        """
        facts: dict[str, Any] = {
            "variant": run.variant,
            "training": asdict(run.training),
            "start": asdict(run.start) if run.start else None,
            "weights": hash_weights([run.weights, self.family]),
            "settings": self.settings.told(),
        }
        facts = json.loads(json.dumps(facts))
        files = {part: self.out / run.folder.name / f"{part.replace('/', '-')}.json" for part in self.parts}
        todo = [part for part, file in files.items() if not _is_scored(file, facts)]
        if not todo:
            self.say(f"{run.folder.name}: scored already")
            return
        model = Model(run, self.family, self.settings.sampling, self.device)
        truth = self._truth_of(model)
        facts["environment"] = environment()
        for part in todo:
            if part in ANSWERED:
                found: dict[str, Any] = {"answers": answer(model.planner.model, truth.sheets.asked(part), self.batch)}
                told = f"{sum(record['right'] for record in found['answers'])} answers are right"
            else:
                found = self._rendered(model, truth, part, thinking=run.variant == "thinking")
                told = ", ".join(f"{way} {_main(rows)}" for way, rows in found["scores"].items())
            with replacing(files[part]) as temporary:
                temporary.write_text(json.dumps({**facts, **found}) + "\n")
            self.say(f"{run.folder.name}: {part}: {told}")

    def _truth_of(self, model: Model) -> Truth:
        """What is true for a run's vision tower."""
        own, template = model.planner.model, model.planner.template
        truth = self._truth
        seen = truth and (truth.model.tower_print, truth.sheets.template.vision)
        if truth is None or seen != (own.tower_print, template.vision):
            truth = self._truth = Truth(own, Sheets(self.settings.exam, template), self.batch, self.workers)
        return truth

    @torch.no_grad()
    def _rendered(self, model: Model, truth: Truth, category: str, thinking: bool) -> dict[str, Any]:
        """Scores of a category by way, and how good the predicted plans are."""
        items, true = self.items(category), truth.embeds(category)
        scores: dict[str, list[Iterator[Record]]] = {}
        embeds, concluded = [], []

        def judged(way: str, asked: Sequence[Conversation], made: Sequence[Tensor]) -> None:
            outputs = [pixels.numpy() for pixels in made]
            scores.setdefault(way, []).append(self.mapped(read_output, [bare(item) for item in asked], outputs))

        for first in range(0, len(items), self.batch):
            some = items[first : first + self.batch]
            seeds = [draw_seed("cotraining", category, item.key) % 2**32 for item in some]
            predicted = model.plan(some, seeds)
            embeds += [plan.embeds.float() for plan in predicted]
            judged("without", some, model.render(some, seeds, None))
            judged("predicted", some, model.render(some, seeds, predicted))
            judged("true", some, model.render(some, seeds, model.adopt(some, [*true[first : first + self.batch]])))
            if not (thinking and category.endswith("/reason")):
                continue
            thought = model.think(some)
            concluded += [own.prompt == item.info["explicit"] for own, item in zip(thought, some, strict=True)]
            judged("text", some, model.make(thought, seeds))
            if some[0].spec.target == "video":
                framed = by_frame(thought, partial(model.make, seeds=seeds))
                judged("vision", some, model.make(framed, seeds))
        records = {way: list(chain.from_iterable(rows)) for way, rows in scores.items()}
        for record, right in zip(records.get("text", []), concluded, strict=True):
            record["concluded"] = float(right)
        return {"scores": records, "plans": measure(truth, category, torch.stack(embeds)).records}


def _main(rows: Sequence[Record]) -> str:
    """Mean of the score that counts most, in per cent."""
    metric = "edit_done" if "edit_done" in rows[0] else "attributes"
    return f"{100 * sum(float(row[metric]) for row in rows) / len(rows):.1f}"


def _is_scored(file: Path, facts: dict[str, Any]) -> bool:
    """Whether a part has its scores.

    Raises:
        ConfigError: They are of something else.
    """
    if not file.is_file():
        return False
    found = json.loads(file.read_text())
    if differ := [name for name in facts if found.get(name) != facts[name]]:
        raise ConfigError(
            f"there are scores of other {differ[0]}",
            where=str(file),
            why="two models or two ways to score would end in one table",
            fix="use another --out, or delete the folder",
        )
    return True

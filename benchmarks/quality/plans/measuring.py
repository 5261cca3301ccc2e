"""Plans and answers of a planner on an exam, one record an item."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.quality.plans.exam import ProbeTargets, Question, Sheet, Sheets
from bernini.planner.conversations import ConversationPlanner
from bernini.planner.model import PlannerModel
from bernini.planner.planning import PlanningConfig
from bernini.planner.probe import Probe, ProbeAccuracy
from bernini.planner.quality import PlanCosine, PlanExplainedVariance, PlanRetrieval, cosines, retrieved
from bernini.planner.template import IGNORED, PlannerTemplate, pack
from bernini.planner.validation import right_tokens, token_grid
from bernini.planner.vision import Visual
from bernini.seeds import draw_seed
from datamodules.toyworld.labels import SLOTS

GALLERY = 256  # targets of a category that a plan's own is told from
Record = dict[str, Any]
T = TypeVar("T")


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[PlannerModel, PlannerTemplate]:
    """Read a planner and what writes for it.

    Args:
        folder: What `callbacks.SavePlanner` wrote, or a released folder.
        dtype: Dtype of the weights.
        device: Where to compute.

    Raises:
        CheckpointError: It is no planner's folder.
    """
    planner = ConversationPlanner.from_pretrained(folder, dtype).to(device)
    return planner.model, planner.template


class Truth:
    """What a vision tower makes of the targets of an exam, and probes that learned from such embeddings.

    Args:
        model: A planner with that tower.
        sheets: The exam.
        batch: Targets that the tower sees at once.
        workers: Processes that draw what probes learn from; 0 draws it here.
    """

    def __init__(self, model: PlannerModel, sheets: Sheets, batch: int, workers: int = 0) -> None:
        self.model, self.sheets, self.batch, self.workers = model, sheets, batch, workers
        self.embeds = lru_cache(maxsize=None)(self._embeds)
        self.probe = lru_cache(maxsize=None)(self._probe)

    @torch.no_grad()
    def _embeds(self, category: str) -> Tensor:
        """``[M, N, D]`` fp32 of the targets of a category."""
        sheets = self.sheets.planned(category)
        return torch.cat([self._see([sheet.target for sheet in some]) for some in batches(sheets, self.batch)])

    @torch.no_grad()
    def _probe(self, moving: bool) -> Probe:
        """A probe for clips, or for images."""
        embeds, labels = [], []
        targets = ProbeTargets(self.sheets.exam, moving, self.sheets.template.vision)
        for some, given in DataLoader(targets, self.batch, num_workers=self.workers, collate_fn=_stack):
            embeds.append(self._see([replace(some, patches=patches) for patches in some.patches]))
            labels.append(given)
        return Probe.fit(torch.cat(embeds), torch.cat(labels).to(embeds[0].device), SLOTS)

    def _see(self, visuals: Sequence[Any]) -> Tensor:
        return self.model.see(visuals).float().unflatten(0, (len(visuals), -1))


def _stack(targets: Sequence[tuple[Visual, list[int]]]) -> tuple[Visual, Tensor]:
    """Visuals of one grid as one, with patches ``[B, rows, columns]``: a process can hand over only so many tensors."""
    visuals, labels = zip(*targets, strict=True)
    return replace(visuals[0], patches=torch.stack([visual.patches for visual in visuals])), torch.tensor(labels)


@dataclass(frozen=True)
class Measured:
    """How good the plans of a category are.

    Attributes:
        figures: ``cosine``, ``explained_variance``, ``retrieval@1`` and ``@5`` among ``gallery`` targets, ``probe``,
            ``probe_true`` and ``probe_relative``.
        records: For each item its ``key``, mean ``cosine`` over tokens, ``error`` and ``spread``, the squares of which
            the explained variance is made, ``found``, the chance to be the first of the gallery, ``asked``, the slots
            that its target has an answer for, and which of them a probe reads ``right`` from the plan and
            ``right_true`` from the true embeddings.
    """

    figures: dict[str, float]
    records: list[Record]


@torch.no_grad()
def plan(model: PlannerModel, sheets: Sequence[Sheet], configs: Sequence[PlanningConfig], batch: int) -> list[Tensor]:
    """Plan samples in several ways; order and noise are the sample's own.

    Args:
        model: The planner.
        sheets: The samples, with targets of one grid.
        configs: The ways.
        batch: Samples that are planned at once.

    Returns:
        ``[M, N, D]`` fp32 for every way.
    """
    planner = model.planner()
    made: list[list[Tensor]] = [[] for _ in configs]
    for some in batches(sheets, batch):
        seeds = [draw_seed("plan", sheet.key) % 2**32 for sheet in some]
        requests = model.requests([sheet.streams for sheet in some], seeds)
        for own, config in zip(made, configs, strict=True):
            own += [found.embeds.float() for found in planner.plan(requests, config)]
    return [torch.stack(own) for own in made]


def measure(truth: Truth, category: str, planned: Tensor) -> Measured:
    """Compare plans of a category with the truth.

    Args:
        truth: Of the planner's tower.
        category: What was planned.
        planned: ``[M, N, D]`` fp32.
    """
    sheets, true = truth.sheets.planned(category), truth.embeds(category)
    flat, flat_true = planned.flatten(0, 1), true.flatten(0, 1)
    labels = torch.tensor([sheet.labels for sheet in sheets], device=true.device)
    probe = truth.probe(sheets[0].target.is_video)

    cosine, variance, retrieval = PlanCosine(), PlanExplainedVariance(true.shape[2]), PlanRetrieval(GALLERY)
    accuracy = ProbeAccuracy(len(SLOTS))
    for metric in (cosine, variance, retrieval, accuracy):
        metric.to(true.device)
    cosine.update(flat, flat_true)
    variance.update(flat, flat_true)
    retrieval.update(flat, flat_true, [token_grid(sheet.target) for sheet in sheets])
    accuracy.update(probe, planned, true, labels)
    found = {"cosine": cosine.compute(), "explained_variance": variance.compute()}
    found |= retrieval.compute() | accuracy.compute()

    columns = {
        "cosine": cosines(flat, flat_true).view(len(true), -1).mean(1),
        "error": (planned - true).square().sum((1, 2)),
        "spread": (true - flat_true.mean(0)).square().sum((1, 2)),
        "found": retrieved(planned.flatten(1), true.flatten(1), GALLERY, (1,))[0],
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    reads = zip(*((probe.read(embeds) == labels).tolist() for embeds in (planned, true)), strict=True)
    records = []
    for sheet, values, (right, right_true) in zip(sheets, rows, reads, strict=True):
        asked = [slot for slot, label in enumerate(sheet.labels) if label >= 0]
        read = {"right": [slot for slot in asked if right[slot]], "right_true": [s for s in asked if right_true[s]]}
        records.append({"key": sheet.key, **dict(zip(columns, values, strict=True)), "asked": asked, **read})
    return Measured({name: value.item() for name, value in found.items()}, records)


@torch.no_grad()
def answer(model: PlannerModel, questions: Sequence[Question], batch: int) -> list[Record]:
    """Whether greedy decoding gives the answer, word for word: ``key``, ``kind`` and ``right`` of every question."""
    records = []
    for some in batches(questions, batch):
        packed = pack([question.written for question in some]).to(model.mask_tokens.device)
        labelled = [int((question.written.labels != IGNORED).sum()) for question in some]
        for question, right in zip(some, right_tokens(model(packed), labelled), strict=True):
            records.append({"key": question.key, "kind": question.kind, "right": bool(right.all())})
    return records


def batches(items: Sequence[T] | Iterator[T], size: int) -> Iterator[list[T]]:
    """At most ``size`` together."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some

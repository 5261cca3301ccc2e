"""Figures of records, as functions of how often each record counts."""

from collections.abc import Sequence

import numpy as np

from benchmarks.quality.bootstrap import Floats, Statistic, estimate, mean_of
from benchmarks.quality.interface import interval
from benchmarks.quality.plans.measuring import Record
from datamodules.toyworld.labels import SLOTS

METRICS = {
    "cosine": "cosine of planned and true embeddings, mean over tokens",
    "explained_variance": "share of the true embeddings' variance that plans explain",
    "retrieval@1": "plans that are nearer to their own target than to the others of the gallery",
    "probe": "what the probe reads from plans that is right, mean over the questions that it knows",
    "probe_true": "the same from the true embeddings",
    "probe_relative": "the former over the latter",
}
SHARES = ("retrieval@1", "answers")
"""Shares of whole items, which have Wilson's interval; all others have a bootstrap's."""


def statistic(records: Sequence[Record], metric: str) -> Statistic:
    """A figure of plans, or ``answers``, the share of right ones, of a list of records."""
    columns = {"cosine": "cosine", "retrieval@1": "found", "answers": "right"}
    if metric in columns:
        return mean_of(_column(records, columns[metric]))
    if metric == "explained_variance":
        error, spread = _column(records, "error"), _column(records, "spread")
        return lambda counts: 1 - counts @ error / (counts @ spread)
    asked, planned, true = (_slots(records, name) for name in ("asked", "right", "right_true"))
    if metric == "probe_relative":
        return lambda counts: _accuracy(counts, planned, asked) / _accuracy(counts, true, asked)
    right = {"probe": planned, "probe_true": true}[metric]
    return lambda counts: _accuracy(counts, right, asked)


def bounds(records: Sequence[Record], metric: str) -> tuple[float, float, float]:
    """A figure and the ends of its 95 % interval over items."""
    found = estimate([statistic(records, metric)], len(records))
    low, high = interval(found.mean, len(records)) if metric in SHARES else found.bounds
    return found.mean, low, high


def text(records: Sequence[Record], metric: str) -> str:
    """A figure with its interval, in percent, e.g. ``83.1 [80.2, 86.0]``."""
    value, low, high = (f"{100 * x:.1f}" for x in bounds(records, metric))
    return f"{value} [{low}, {high}]"


def _column(records: Sequence[Record], name: str) -> Floats:
    return np.array([record[name] for record in records], dtype=np.float64)


def _slots(records: Sequence[Record], name: str) -> Floats:
    """``[items, slots]`` 1 where a slot is listed."""
    table = np.zeros((len(records), len(SLOTS)))
    for row, record in zip(table, records, strict=True):
        row[record[name]] = 1
    return table


def _accuracy(counts: Floats, right: Floats, asked: Floats) -> Floats:
    """Mean over slots of the share of right answers; slots without any are left out."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nanmean(counts @ right / (counts @ asked), axis=1))

"""Scores that models give, by benchmark and name; what a benchmark needs names their weights."""

from collections.abc import Mapping

from benchmarks.quality.models.base import Measure
from benchmarks.quality.models.editverse import EDITVERSE
from benchmarks.quality.models.five import FIVE
from benchmarks.quality.models.ivebench import IVEBENCH
from benchmarks.quality.models.opens2v import OPENS2V
from benchmarks.quality.models.vbench import VBENCH, VBENCH_I2V

MEASURES: Mapping[str, Mapping[str, Measure]] = {
    "vbench": VBENCH,
    "vbench_i2v": VBENCH_I2V,
    "opens2v": OPENS2V,
    "editverse": EDITVERSE,
    "five": FIVE,
    "ivebench": IVEBENCH,
}

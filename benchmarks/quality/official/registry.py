"""All official benchmarks, by their names on the command line."""

from benchmarks.quality.official.base import OfficialBenchmark
from benchmarks.quality.official.bernini_bench import BerniniBench
from benchmarks.quality.official.dpg import DPG
from benchmarks.quality.official.editverse import EditVerse
from benchmarks.quality.official.five import FiVE
from benchmarks.quality.official.gedit import GEdit
from benchmarks.quality.official.geneval import GenEval
from benchmarks.quality.official.imgedit import ImgEdit
from benchmarks.quality.official.ivebench import IVEBench
from benchmarks.quality.official.opens2v import OpenS2V
from benchmarks.quality.official.openve import OpenVE
from benchmarks.quality.official.rise import RISE
from benchmarks.quality.official.vbench import VBench
from benchmarks.quality.official.vbench2 import VBench2
from benchmarks.quality.official.vbench_i2v import VBenchI2V
from benchmarks.quality.official.wise import WISE, WISELegacy

OFFICIAL: dict[str, type[OfficialBenchmark]] = {
    kind.name: kind
    for kind in (
        VBench,
        VBenchI2V,
        VBench2,
        OpenS2V,
        OpenVE,
        EditVerse,
        FiVE,
        IVEBench,
        BerniniBench,
        GEdit,
        ImgEdit,
        GenEval,
        DPG,
        WISE,
        WISELegacy,
        RISE,
    )
}

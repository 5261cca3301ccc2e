"""How the figures of each benchmark follow from others of the same row, by the name that tables of figures give it."""

from collections.abc import Mapping

from benchmarks.quality.totals import (
    arena,
    five,
    geneval,
    imgedit,
    ivebench,
    opens2v,
    openve,
    rise,
    vbench,
    vbench2,
    vbench_i2v,
    wise,
)
from benchmarks.quality.totals.rules import Rule

RULES: Mapping[str, tuple[Rule, ...]] = {
    "vbench": vbench.RULES,
    "vbench_i2v": vbench_i2v.RULES,
    "vbench2": vbench2.RULES,
    **{f"opens2v {version} {domain}": opens2v.rules(version, domain) for version, domain in opens2v.WEIGHTS},
    **{f"openve {len(types)} types": openve.rules(types) for types in (openve.FIVE, openve.SIX, openve.EIGHT)},
    "five_acc": five.RULES,
    "ivebench": ivebench.RULES,
    "imgedit": imgedit.RULES,
    "geneval": geneval.RULES,
    "wise": wise.RULES,
    "wise_legacy": wise.RULES_LEGACY,
    "rise": rise.RULES,
    "arena": arena.RULES,
    **dict.fromkeys(("five", "editverse", "bernini_bench", "v2vbench", "readme"), ()),  # figures without a total
}

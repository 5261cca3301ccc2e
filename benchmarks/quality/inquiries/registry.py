"""Benchmarks whose outputs a judge can be asked about, by name."""

from typing import Any

from benchmarks.quality.inquiries.base import Inquiry
from benchmarks.quality.inquiries.bernini_bench import BerniniBenchInquiry
from benchmarks.quality.inquiries.editverse import EditVerseInquiry
from benchmarks.quality.inquiries.five import FiVEInquiry
from benchmarks.quality.inquiries.gedit import GEditInquiry
from benchmarks.quality.inquiries.imgedit import ImgEditInquiry
from benchmarks.quality.inquiries.ivebench import IVEBenchInquiry
from benchmarks.quality.inquiries.opens2v import OpenS2VInquiry
from benchmarks.quality.inquiries.openve import OpenVEInquiry
from benchmarks.quality.inquiries.rise import RISEInquiry
from benchmarks.quality.inquiries.wise import WISEInquiry, WISELegacyInquiry

INQUIRIES: dict[str, type[Inquiry[Any]]] = {
    "opens2v": OpenS2VInquiry,
    "openve": OpenVEInquiry,
    "editverse": EditVerseInquiry,
    "five": FiVEInquiry,
    "ivebench": IVEBenchInquiry,
    "bernini_bench": BerniniBenchInquiry,
    "gedit": GEditInquiry,
    "imgedit": ImgEditInquiry,
    "wise": WISEInquiry,
    "wise_legacy": WISELegacyInquiry,
    "rise": RISEInquiry,
}

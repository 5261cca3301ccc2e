"""Benchmarks whose outputs a judge can be asked about, by name."""

from typing import Any

from benchmarks.quality.inquiries.base import Inquiry
from benchmarks.quality.inquiries.gedit import GEditInquiry
from benchmarks.quality.inquiries.openve import OpenVEInquiry

INQUIRIES: dict[str, type[Inquiry[Any]]] = {"openve": OpenVEInquiry, "gedit": GEditInquiry}

"""Who judges the outputs of a benchmark, and how: what options and configurations name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.quality.folder import RunFolder
from benchmarks.quality.inquiries.base import Inquiry
from benchmarks.quality.inquiries.registry import INQUIRIES
from benchmarks.quality.interface import Benchmark, Item
from benchmarks.quality.judged_scoring import score_by_judge
from benchmarks.quality.judging.endpoint import EndpointConfig, EndpointJudge
from benchmarks.quality.judging.judged import Judged
from benchmarks.quality.judging.question import Judge
from bernini.errors import ConfigError


@dataclass(frozen=True)
class JudgeConfig:
    """A judge, and how it is asked.

    Attributes:
        endpoint: A model behind an OpenAI-compatible chat endpoint.
        local: Folder of a Qwen2.5-VL on this machine instead.
        repeats: How often each question is asked; null for as often as the benchmark's protocol has it.
        cap: Whether scores above the one that caps them are lowered, ``off`` or ``enforce``; null is ``off``, and all
            that fits a rubric without such a rule.
        rubric: JSON file of other texts; empty for our own.
    """

    endpoint: EndpointConfig | None = None
    local: str = ""
    repeats: int | None = None
    cap: Literal["off", "enforce"] | None = None
    rubric: str = ""

    def __post_init__(self) -> None:
        if (self.endpoint is None) == (not self.local):
            raise ConfigError("a judge is either an endpoint or local", fix="name one of the two")

    def check(self, benchmark: Benchmark) -> None:
        """See that it can be asked about a benchmark, as far as can be seen without asking or loading it.

        Raises:
            ConfigError: There are no questions about the benchmark, no cap in its rubric, no key, no such file.
            DataError: The rubric is damaged or of another benchmark.
        """
        self.inquiry(benchmark)
        if self.endpoint is not None:
            EndpointJudge(self.endpoint)
        elif not (Path(self.local) / "config.json").is_file():
            raise ConfigError(f"there is no judge in {self.local}", where="the local judge", fix="download one")

    def inquiry(self, benchmark: Benchmark) -> Inquiry[Any]:
        """What is asked about a benchmark.

        Raises:
            ConfigError: Nothing can be asked, the rubric has no cap, or is no file.
            DataError: The rubric is damaged or of another benchmark.
        """
        kind = INQUIRIES.get(benchmark.name)
        if kind is None:
            raise ConfigError(
                f"no judge can be asked about {benchmark.name}",
                why=f"there are questions for {', '.join(INQUIRIES)}",
                fix="leave the judge out",
            )
        inquiry = kind(benchmark, Path(self.rubric) if self.rubric else None)
        if self.cap and inquiry.cap is None:
            raise ConfigError(f"the rubric of {benchmark.name} caps no score", where="--cap", fix="leave the cap out")
        return inquiry

    def judge(self, device: torch.device | str | None = None) -> Judge:
        """The judge itself.

        Args:
            device: Where a local one runs; left out, on a GPU if there is one.

        Raises:
            ConfigError: Its key is not there.
            CheckpointError: A local one cannot be read.
        """
        if self.endpoint is not None:
            return EndpointJudge(self.endpoint)
        from benchmarks.quality.judging.local import LocalJudge

        return LocalJudge(self.local, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def score(
        self,
        benchmark: Benchmark,
        items: Sequence[Item],
        folder: RunFolder,
        judge: Judge,
        *,
        seconds: float | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Judged:
        """Have outputs judged, see `score_by_judge`."""
        inquiry = self.inquiry(benchmark)
        return score_by_judge(
            inquiry,
            items,
            folder,
            judge,
            repeats=inquiry.repeats if self.repeats is None else self.repeats,
            cap=inquiry.cap and replace(inquiry.cap, rule=self.cap or "off"),
            seconds=seconds,
            progress=progress,
        )

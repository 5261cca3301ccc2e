"""A run as one HTML file that needs nothing else: figures, curves and clips side by side, with what produced them."""

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import jinja2

from bernini import chart
from bernini.chart import Chart, plot
from bernini.errors import DataError
from bernini.files import replacing

MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
BROWSER_FORMATS = ("yuv420p", "yuvj420p")
MAX_MIB = 30.0


@dataclass(frozen=True)
class Case:
    """One example: what was asked for, what went in, what came out.

    Attributes:
        title: Short name, e.g. the task and the sample's key.
        instruction: The prompt.
        clips: Label and file, in reading order: sources, references, target, output. MP4 files are embedded as they
            are, and browsers play H.264 in yuv420p; any other pixel format is named in the caption. PNG, JPEG and WebP
            files serve for images.
        scores: Figures of this example, or words.
        facets: What it can be found by, e.g. its task and category; the page has a menu for each.
        notes: Label and text of what is too long for a figure, such as a judge's answer; they unfold.
    """

    title: str
    instruction: str
    clips: Sequence[tuple[str, Path]]
    scores: Mapping[str, float | str] = field(default_factory=dict)
    facets: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[tuple[str, str]] = ()

    @property
    def figures(self) -> dict[str, float]:
        """The scores that can be compared."""
        return {n: score for n, score in self.scores.items() if not isinstance(score, str) and math.isfinite(score)}


@dataclass(frozen=True)
class Table:
    """Figures in rows and columns.

    Attributes:
        title: What it shows.
        head: Names of the columns; the first column names the rows.
        body: Rows, as long as the head.
        note: A line above it, e.g. the unit.
    """

    title: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What a report shows, from top to bottom.

    Attributes:
        title: Heading.
        lead: A sentence or two under the heading: what was run, and to what end.
        summary: Label, value and note of each headline figure.
        tables: Figures by row and column.
        charts: Curves over the steps of training.
        cases: Examples.
        commands: Command lines that produced the run, in order.
        config: The run's configuration, YAML.
        environment: Facts of the machine, as ``benchmarks.quality.environment`` gives them.
    """

    title: str
    lead: str = ""
    summary: Sequence[tuple[str, str, str]] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    cases: Sequence[Case] = ()
    commands: Sequence[str] = ()
    config: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Clip:
    """An embedded file: data URI, size in pixels, and what to say of it under its label."""

    label: str
    uri: str
    width: int
    height: int
    is_video: bool
    caption: str


def write_report(report: Report, path: str | Path, max_mib: float = MAX_MIB) -> Path:
    """Write a report.

    Args:
        report: What it shows.
        path: HTML file to write; folders are made.
        max_mib: Greatest size of the file in MiB.

    Returns:
        The file's path.

    Raises:
        DataError: A clip is missing, cannot be decoded or is of a kind that browsers do not show, or the file would be
            too large.
    """
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(files("bernini").joinpath("report.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        report=report,
        frame=chart,
        plots=[(c.title, plot(c)) for c in report.charts],
        cases=[(case, [embed(label, file) for label, file in case.clips]) for case in report.cases],
        menus=menus(report.cases),
        figures=list(dict.fromkeys(name for case in report.cases for name in case.figures)),
    ).encode("utf-8", errors="replace")
    if len(page) > max_mib * 2**20:
        raise DataError(
            f"the report would be {len(page) / 2**20:.1f} MiB, more than {max_mib:g}",
            where=str(path),
            why="every clip is embedded, a third larger than its file",
            fix="show fewer cases, or shorter or smaller clips",
        )
    with replacing(path) as temporary:
        temporary.write_bytes(page)
    return Path(path)


def menus(cases: Sequence[Case]) -> dict[str, list[str]]:
    """The values of each facet, in order of appearance; a facet of one value is no choice."""
    found: dict[str, dict[str, None]] = {}
    for case in cases:
        for facet, value in case.facets.items():
            found.setdefault(facet, {})[value] = None
    return {facet: list(values) for facet, values in found.items() if len(values) > 1}


def embed(label: str, path: Path) -> Clip:
    """Read a clip or an image into a data URI.

    Raises:
        DataError: The file is missing, cannot be decoded, or is of a kind that browsers do not show.
    """
    import av

    suffix = Path(path).suffix.lower()
    if suffix not in MEDIA_TYPES:
        raise DataError("a report cannot show this kind of file", where=str(path), fix=f"use {', '.join(MEDIA_TYPES)}")
    try:
        content = Path(path).read_bytes()
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frame = next(container.decode(stream))
            frames, rate = stream.frames, stream.average_rate
    except (OSError, IndexError, StopIteration, av.error.FFmpegError) as error:
        raise DataError(f"a clip of the report cannot be read: {error}", where=str(path)) from error
    is_video = suffix == ".mp4"
    facts = [f"{frame.width}×{frame.height}"]  # noqa: RUF001
    if is_video:
        facts += [f"{frames} frames", f"{float(rate):g} fps"] if rate else [f"{frames} frames"]
        if frame.format.name not in BROWSER_FORMATS:
            facts.append(f"{frame.format.name}, which not every browser plays")
    uri = f"data:{MEDIA_TYPES[suffix]};base64,{b64encode(content).decode()}"
    return Clip(label, uri, frame.width, frame.height, is_video, " · ".join(facts))

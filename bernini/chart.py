"""Line charts as plain geometry: what to draw, in pixels of a fixed frame, for a template to write down as SVG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from bernini.errors import DataError

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 24
MAX_POINTS, MAX_MARKS = 1000, 48


@dataclass(frozen=True)
class Curve:
    """One series.

    Attributes:
        name: Name in the legend.
        steps: Training steps, ascending.
        values: One value a step; values that are not finite leave a gap.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise DataError(
                f"curve {self.name!r} has {len(self.steps)} steps and {len(self.values)} values",
                fix="give one value for each step",
            )


@dataclass(frozen=True)
class Chart:
    """Curves that share a pair of axes.

    Attributes:
        title: What is measured, with its unit.
        curves: The series.
        log_y: Logarithmic value axis; values that are not positive leave a gap.
        smoothing: Weight in [0, 1) of the past in a moving average, drawn over the values themselves; 0 for none.
    """

    title: str
    curves: Sequence[Curve]
    log_y: bool = False
    smoothing: float = 0.0


class Point(NamedTuple):
    """A value that can be drawn; points of one ``run`` are joined by a line."""

    step: int
    value: float
    run: int


@dataclass(frozen=True)
class Tick:
    """A grid line at ``at`` pixels."""

    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A point at ``(x, y)`` pixels that says its value when it is pointed at."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Line:
    """A drawn curve.

    Attributes:
        name: Name in the legend.
        path: SVG path data of the curve, or of its moving average.
        raw: SVG path data of the values behind a moving average, else empty.
        last: Last value of ``path``, for the legend.
        marks: Points to be pointed at.
        sparse: Whether the points are few enough to be shown.
    """

    name: str
    path: str
    raw: str
    last: str
    marks: list[Mark]
    sparse: bool


@dataclass(frozen=True)
class Plot:
    """A chart's geometry; ``lines`` is empty where nothing can be drawn."""

    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def plot(chart: Chart) -> Plot:
    """Lay a chart out in a frame of ``WIDTH`` by ``HEIGHT`` pixels.

    Args:
        chart: Series and axes.

    Returns:
        The geometry, all of it inside the frame.
    """

    def drawable(value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not chart.log_y)

    curves = [c for c in chart.curves if any(map(drawable, c.values))]
    if not curves:
        return Plot([], [], [])
    values = [v for c in curves for v in c.values if drawable(v)]
    steps = [s for c in curves for s in c.steps]
    y_grid = log_grid(min(values), max(values)) if chart.log_y else linear_grid(min(values), max(values))
    first, last = min(steps), max(steps)
    if first == last:
        first, last = first - 1, last + 1

    def across(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def scale(value: float) -> float:
        return math.log(value) if chart.log_y else value

    low, high = scale(y_grid[0]), scale(y_grid[-1])

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (scale(value) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(points: Sequence[Point]) -> str:
        parts = []
        for before, point, after in zip([None, *points], points, [*points[1:], None], strict=False):
            starts, ends = before is None or before.run != point.run, after is None or after.run != point.run
            dot = "h0" if starts and ends else ""  # a point on its own is drawn as a dot of the line's width
            parts.append(f"{'M' if starts else 'L'}{across(point.step):.1f} {up(point.value):.1f}{dot}")
        return "".join(parts)

    def draw(curve: Curve) -> Line:
        raw = _points(curve, drawable)
        shown = raw
        if chart.smoothing:
            means = smooth([p.value for p in raw], chart.smoothing)
            shown = [p._replace(value=mean) for p, mean in zip(raw, means, strict=True)]
        marks = [
            Mark(round(across(p.step), 1), round(up(p.value), 1), f"{curve.name}, step {p.step:,}: {p.value:.4g}")
            for p in _thin(shown, MAX_MARKS)
        ]
        return Line(
            curve.name,
            path(_thin(shown, MAX_POINTS)),
            path(_thin(raw, MAX_POINTS)) if chart.smoothing else "",
            f"{shown[-1].value:.3g}",
            marks,
            len(shown) <= MAX_MARKS // 2,
        )

    x_grid = [t for t in linear_grid(first, last, count=7, whole=True) if first <= t <= last]
    return Plot(
        [draw(c) for c in curves],
        [Tick(round(across(t), 1), label) for t, label in zip(x_grid, labels(x_grid), strict=True)],
        [Tick(round(up(t), 1), label) for t, label in zip(y_grid, labels(y_grid), strict=True)],
    )


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average without the pull towards zero of its start.

    ``m_i = weight * m_(i-1) + (1 - weight) * v_i`` from ``m_0 = 0``, divided by ``1 - weight ** i`` (the bias
    correction of Adam, Kingma and Ba, section 3).

    Args:
        values: The series, finite.
        weight: Weight of the past, in [0, 1).

    Returns:
        As many values.
    """
    mean, out = 0.0, []
    for i, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**i))
    return out


def linear_grid(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, the first at or below ``low``, the last at or above ``high``.

    Args:
        low: Least value.
        high: Greatest value.
        count: Intervals aimed at.
        whole: Whether only whole numbers will do.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(step, 1.0)
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(start, stop + 1)]


def log_grid(low: float, high: float, count: int = 6) -> list[float]:
    """Powers of ten, with their doubles and quintuples where there is room, around positive ``low`` and ``high``."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    fine = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
    inside = fine[max(i for i, v in enumerate(fine) if v <= low * (1 + 1e-9)) :]
    stop = next(i for i, v in enumerate(inside) if v >= high * (1 - 1e-9) and i > 0)
    grid = inside[: stop + 1]
    if len(grid) <= count + 1:
        return grid
    stride = math.ceil((last - first) / count)
    decades = [10.0**k for k in range(first, last + stride, stride)]
    return decades[: next(i for i, v in enumerate(decades) if v >= high * (1 - 1e-9)) + 1]


def labels(grid: Sequence[float]) -> list[str]:
    """Write grid values down, alike and as short as keeps them apart."""
    top = max(map(abs, grid))
    unit, suffix = next(((u, s) for u, s in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if top >= 10 * u), (1.0, ""))
    plain = [f"{v / unit:.6g}" for v in grid]
    even = {round(b - a, 12) for a, b in pairwise(grid)}
    if len(even) == 1 and not any("e" in text for text in plain):
        decimals = max(len(text.partition(".")[2]) for text in plain)
        plain = [f"{v / unit + 0.0:.{decimals}f}" for v in grid]
    return [text if float(text) == 0 else text + suffix for text in plain]


def _points(curve: Curve, drawable: Callable[[float], bool]) -> list[Point]:
    """The points that can be drawn, numbered by the run without a gap that they belong to."""
    points, run = [], 0
    for step, value in zip(curve.steps, curve.values, strict=True):
        if drawable(value):
            points.append(Point(step, value, run))
        else:
            run += 1
    return points


def _thin(points: list[Point], most: int) -> list[Point]:
    """At most ``most`` points, evenly spaced, first and last among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]

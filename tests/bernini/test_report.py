"""The HTML report: it stands alone, says what it was given and shows the clips as they are."""

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality.environment import environment
from bernini.chart import HEIGHT, WIDTH, Chart, Curve, labels, linear_grid, log_grid, plot, smooth
from bernini.errors import DataError
from bernini.media import write_image, write_video
from bernini.report import Case, Report, write_report

VOID = {"meta", "link", "img"}
VALUES = st.floats(-1e9, 1e9, allow_subnormal=False)


class Page(HTMLParser):
    """Elements with their attributes, and the text, of a page whose tags must nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"attribute given twice in {tag}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    pixels = torch.randint(0, 256, (3, 6, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_video(folder / "source.mp4", pixels, 8)
    write_video(folder / "output.mp4", 255 - pixels, 8)
    write_video(folder / "lossless.mp4", pixels, 8, lossless=True)
    write_image(folder / "reference.png", pixels[:, :1])
    return {path.stem: path for path in folder.iterdir()}


def test_clips_are_embedded_unchanged_and_in_order(clips: dict[str, Path], tmp_path: Path) -> None:
    shown = ["source", "reference", "output"]
    case = Case("rv2v", "paint it", [(name, clips[name]) for name in shown], {"colour": 0.5})
    page = Page(write_report(Report("run", cases=[case, case]), tmp_path / "new" / "report.html"))
    media = [(tag, a) for tag, a in page.elements if tag in ("video", "img")]
    assert [tag for tag, _ in media] == ["video", "img", "video"] * 2
    for (_, attributes), name in zip(media, shown * 2, strict=True):
        head, _, data = str(attributes["src"]).partition(";base64,")
        assert head in ("data:video/mp4", "data:image/png")
        assert base64.b64decode(data) == clips[name].read_bytes()
        assert (attributes["width"], attributes["height"]) == ("48", "32")
    assert all({"autoplay", "muted", "loop", "playsinline"} <= a.keys() for a in page.all("video"))
    assert "48×32 · 6 frames · 8 fps" in page.text  # noqa: RUF001


def test_nothing_is_fetched(clips: dict[str, Path], tmp_path: Path) -> None:
    report = Report(
        "run",
        charts=[Chart("loss", [Curve("train", [0, 1], [2.0, 1.0])])],
        cases=[Case("v2v", "see https://example.org", [("source", clips["source"])])],
        config="url: https://example.org",
        environment=environment(),
    )
    path = write_report(report, tmp_path / "report.html")
    page = Page(path)
    links = [a[key] for _, a in page.elements for key in ("src", "href", "srcset", "poster", "data") if key in a]
    assert len(links) == 2
    assert all(str(link).startswith("data:") for link in links)
    style = path.read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    (policy,) = (a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none';") and "http" not in str(policy)


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1))
@settings(max_examples=30)
def test_any_text_is_shown_as_it_is(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    hostile = f"{text}\"'><script>alert(1)</script></pre><img src=x onerror=alert(1)>&amp;"
    report = Report(
        hostile,
        lead=hostile,
        summary=[(hostile, hostile, hostile)],
        charts=[Chart(hostile, [Curve(hostile, [1], [1.0])])],
        cases=[Case(hostile, hostile, [], {hostile: 1.0})],
        commands=[hostile],
        config=hostile,
        environment={hostile: hostile},
    )
    page = Page(write_report(report, tmp_path_factory.getbasetemp() / "hostile.html"))
    assert len(page.all("script")) == 1 and not page.all("img")
    assert sum(hostile in part for part in page.text) == 16
    assert page.all("svg")[0]["aria-label"] == hostile


def test_an_empty_report_is_a_page(tmp_path: Path) -> None:
    page = Page(write_report(Report("nothing yet"), tmp_path / "report.html"))
    assert "nothing yet" in page.text and not page.all("section")


def test_a_format_that_browsers_may_not_play_is_named(clips: dict[str, Path], tmp_path: Path) -> None:
    case = Case("t2v", "a clip", [("output", clips["lossless"])])
    page = Page(write_report(Report("run", cases=[case]), tmp_path / "report.html"))
    assert any("not every browser plays" in part for part in page.text)


def test_bad_clips_are_told(clips: dict[str, Path], tmp_path: Path) -> None:
    corrupt = tmp_path / "corrupt.mp4"
    corrupt.write_bytes(clips["source"].read_bytes()[:200])
    wrong = tmp_path / "clip.avi"
    for path in (tmp_path / "missing.mp4", corrupt, wrong):
        with pytest.raises(DataError, match=re.escape(str(path))):
            write_report(Report("run", cases=[Case("v2v", "x", [("source", path)])]), tmp_path / "report.html")
    with pytest.raises(DataError, match=r"more than 0\.01"):
        case = Case("v2v", "x", [("source", clips["source"])])
        write_report(Report("run", cases=[case]), tmp_path / "report.html", max_mib=0.01)
    assert not (tmp_path / "report.html").exists()


@given(st.lists(VALUES, min_size=1, max_size=40), st.booleans(), st.sampled_from([0.0, 0.9]))
def test_everything_drawn_lies_in_the_frame(values: list[float], log_y: bool, smoothing: float) -> None:
    drawn = plot(Chart("c", [Curve("a", range(len(values)), values)], log_y, smoothing))
    if log_y and max(values) <= 0:
        assert not drawn.lines
        return
    (line,) = drawn.lines
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+?) ([\d.-]+)", line.path + line.raw)]
    assert points
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points + [(m.x, m.y) for m in line.marks])
    assert all(0 <= t.at <= HEIGHT for t in drawn.y_ticks) and all(0 <= t.at <= WIDTH for t in drawn.x_ticks)


def test_values_that_cannot_be_drawn_leave_a_gap() -> None:
    values = [1.0, 2.0, math.nan, 3.0, 4.0, math.inf, 5.0]
    (line,) = plot(Chart("c", [Curve("a", range(7), values)])).lines
    assert line.path.count("M") == 3 and line.path.count("L") == 2 and line.path.endswith("h0")
    assert len(line.marks) == 5 and line.last == "5"
    (line,) = plot(Chart("c", [Curve("a", range(4), [1.0, 0.1, 0.0, 0.01])], log_y=True)).lines
    assert line.path.count("M") == 2
    rare = [1.0 if i == 1234 else math.nan for i in range(5000)]
    (line,) = plot(Chart("c", [Curve("a", range(5000), rare)], smoothing=0.9)).lines
    assert line.path == line.raw and line.last == "1"


def test_a_higher_value_is_higher_on_both_scales() -> None:
    for log_y in (False, True):
        (line,) = plot(Chart("c", [Curve("a", [0, 10, 20], [1.0, 10.0, 100.0])], log_y)).lines
        y = [mark.y for mark in line.marks]
        assert y[0] > y[1] > y[2]
        assert math.isclose(y[0] - y[1], y[1] - y[2], abs_tol=0.11) == log_y


def test_long_curves_are_thinned_but_keep_their_ends() -> None:
    (line,) = plot(Chart("c", [Curve("a", range(100_000), [float(i) for i in range(100_000)])])).lines
    assert len(line.path) < 20_000 and len(line.marks) < 100
    assert line.marks[0].label == "a, step 0: 0" and line.marks[-1].label == "a, step 99,999: 1e+05"


@given(VALUES, VALUES)
def test_a_grid_encloses_its_values_and_its_labels_differ(a: float, b: float) -> None:
    low, high = sorted((a, b))
    slack = 1e-6 * (high - low) + 1e-9 * abs(high) + 1e-9 * abs(low)
    grids = [linear_grid(low, high)]
    if low > 0:
        grids.append(log_grid(low, high))
    for grid in grids:
        assert 2 <= len(grid) <= 9
        assert grid[0] <= low + slack and grid[-1] >= high - slack
        assert grid == sorted(set(grid))
        if high - low > 1e-4 * high or low == high:  # labels have six digits
            assert len(set(labels(grid))) == len(grid)


def test_labels_are_short() -> None:
    assert labels([0.0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert labels([0.0, 20_000.0, 40_000.0]) == ["0", "20k", "40k"]
    assert labels([0.05, 0.1, 0.2, 0.5, 1.0, 2.0]) == ["0.05", "0.1", "0.2", "0.5", "1", "2"]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.floats(0, 0.99))
def test_a_moving_average_stays_within_its_values(values: list[float], weight: float) -> None:
    means = smooth(values, weight)
    assert len(means) == len(values) and means[0] == pytest.approx(values[0])
    assert all(min(values) - 1e-6 <= m <= max(values) + 1e-6 for m in means)


def test_a_curve_needs_a_value_for_each_step() -> None:
    with pytest.raises(DataError, match="'loss' has 2 steps and 1 values"):
        Curve("loss", [0, 1], [1.0])


def test_the_environment_names_what_decides_a_result() -> None:
    facts = environment()
    assert facts["torch"] == torch.__version__
    assert facts["processor"].endswith("cores") and facts["memory"].endswith("GiB")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", facts["date"])
    assert (facts["gpu"] == "none") != torch.cuda.is_available()

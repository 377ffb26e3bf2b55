"""`python -m benchmarks report --html --png`: a page that stands by itself, and the README's pictures."""

import io
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results
from benchmarks.__main__ import main
from benchmarks.tables import Table
from tests.benchmark_reports import LAYER, WHERE, everything, row_of

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
from matplotlib.image import imread  # noqa: E402

from benchmarks import page, plots, plots_curves, plots_heat, plots_roof  # noqa: E402

VOID = {"meta", "link", "br", "hr", "img", "input"}
REPORT = everything()
INTERVAL = re.compile(r"\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]")


class Page(HTMLParser):
    """A page taken apart: every tag must be closed where it was opened last."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # tag, name, value
        self.texts: list[tuple[str, str]] = []  # tag, text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data.strip()))

    def of(self, tag: str) -> list[str]:
        return [text for of, text in self.texts if of == tag and text]

    def values(self, name: str) -> list[str]:
        return [value for _, of, value in self.attributes if of == name]


@pytest.fixture(scope="module")
def text() -> str:
    """Of two runs, since names must not clash."""
    return page.render([REPORT, REPORT], cited=[Table("elsewhere", ("who", "value"), [["them & co", "3"]])])


@pytest.fixture(scope="module")
def parsed(text: str) -> Page:
    return Page(text)


def test_the_page_stands_by_itself(text: str, parsed: Page) -> None:
    """Nothing is fetched; names are unique, and those that are referred to are there."""
    assert "//" not in re.sub(r"^// .*$", "", text, flags=re.MULTILINE)
    assert not re.search(r"@import|<link|src=|url\((?!#)", text)
    ids = Counter(parsed.values("id"))
    assert set(ids.values()) == {1}
    used = [value for value in parsed.values("href") if value.startswith("#")]
    assert used == parsed.values("href")
    assert {name[1:] for name in used} | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_every_row_is_in_the_table(parsed: Page) -> None:
    cells = parsed.of("td")
    for row in REPORT.rows:
        assert cells.count(str(row.case)) >= 2
    intervals = sum(bool(INTERVAL.fullmatch(cell)) for cell in cells)
    assert intervals == 2 * len(REPORT.rows)  # one peer each, `auto` and `cpu` in one line


def test_the_page_has_every_section_and_plot(parsed: Page) -> None:
    captions = parsed.of("figcaption")
    maps = ["LSTM training, T=50, over torch.nn, 1 thread", "decoders, forward, over torch loop, 1 thread",
            "search by 5 beams, over torch loop, 1 thread", "attention, training, over plain PyTorch, 1 thread",
            "LSTM training, T=50, memory, over torch.nn, 2 threads"]  # fmt: skip
    curves = [
        "lstm-train-B8-I64-H64 by T, 1 thread",
        str(LAYER),
        "g2p, seed 0: loss",
        "g2p, seed 0: quality",
    ]
    roofs = ["Attention decoders, forward, 1 thread", "Roofline, 1 thread", "Share of the bound, 1 thread"]
    for caption in (*maps, *curves, *roofs):
        assert captions.count(caption) == 2, caption
    assert Counter(parsed.values("role")) == {"img": len(captions)}
    words = " ".join(text for _, text in parsed.texts)
    for told in ("Published by others", "them & co", "not measured here", "torch.compile", "not named", "0.205 s"):
        assert told in words
    assert "Each of 1 contenders against itself came out as 1; 0 of" in words


def test_points_tell_which_rows_they_are(parsed: Page) -> None:
    tips = parsed.of("title")
    timed = [row for row in REPORT.rows if row.set != "self" and row.measure != "memory" and row.threads == 1]
    for row in timed:
        assert any(tip.startswith(f"{row.set} {row.name}: ") for tip in tips)
        assert sum(tip.startswith(f"{row.name}: ") and "of what" in tip for tip in tips) >= 2


def test_text_is_escaped() -> None:
    """Wherever it comes from."""
    bad = "<script>alert('x')</script>"
    row = REPORT.rows[0]
    noted = {name: replace(timing, note=bad, backend=bad) for name, timing in row.timings.items()}
    recipe = replace(REPORT.recipes[0], name=bad, target=bad)
    report = replace(
        REPORT,
        environment=WHERE | {"cpu": bad},
        absent={bad: bad},
        rows=[replace(row, timings=noted, set=bad)],
        recipes=[recipe],
    )
    found = page.render([report], cited=[Table(bad, (bad,), [[bad]])])
    assert bad not in found
    assert found.count("&lt;script&gt;") >= 10
    assert Page(found).texts


def test_doubtful_runs_show_no_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless asked to, as the tables in the terminal do; and no picture is made of them."""
    file, html = tmp_path / "run.jsonl", tmp_path / "page.html"
    replace(REPORT, rows=[replace(row, calm=0.1) for row in REPORT.rows]).save(file)
    assert main(["report", str(file), "--html", str(html)]) == 4
    found = html.read_text()
    assert "This run is in doubt, so its rows are not shown" in found
    assert "rows were disturbed" in found
    assert not re.search(r"<svg|<h3>|class=\"rows\"", found)
    assert "the register tile" in found
    assert main(["report", str(file), "--html", str(html), "--noisy"]) == 0
    found = html.read_text()
    assert "This run is in doubt, shown all the same" in found
    assert all(section in found for section in ("<svg", "<h3>Summary</h3>", 'class="rows"'))
    capsys.readouterr()
    assert main(["report", str(file), "--png", str(tmp_path / "png"), "--noisy"]) == 2
    assert "no pictures, since a run is in doubt" in capsys.readouterr().err


def test_pictures_are_small_and_the_same_each_time(tmp_path: Path) -> None:
    file, folder = tmp_path / "run.jsonl", tmp_path / "a" / "png"
    REPORT.save(file)
    assert main(["report", str(file), "--png", str(folder), "--summary"]) == 0
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == ["decoders.png", "layers.png", "roofline.png"]
    for picture in files:
        assert picture.stat().st_size < 150_000
        pixels = imread(io.BytesIO(picture.read_bytes()))
        assert pixels.shape[2] == 4
        assert 0.3 < pixels[..., :3].mean() < 0.99
        assert pixels[..., 3].min() == 1  # on white wherever it is shown
    before = [f.read_bytes() for f in files]
    page.pictures(folder, [REPORT])
    assert [f.read_bytes() for f in files] == before
    assert page.pictures(folder, [replace(REPORT, rows=[])]) == []


def test_pictures_of_two_machines_are_refused(tmp_path: Path) -> None:
    other = replace(REPORT, environment=WHERE | {"cpu": "another"})
    with pytest.raises(ValueError, match="runs with cpu some CPU and another; draw"):
        page.pictures(tmp_path, [REPORT, other])


def test_a_page_is_the_same_each_time() -> None:
    report = replace(REPORT, rows=REPORT.rows[:4])
    assert page.render([report]) == page.render([report])


def test_runs_with_little_have_pages(tmp_path: Path) -> None:
    """No rows, no ceilings, rows of layers that make no map, names that a run of today does not have."""
    single = row_of("calls", replace(LAYER, I=4), {"auto": [1.0, 2.0], "torch.nn": [2.0, 3.0]})
    for report in (
        results.Report({}, [], {}), results.Report({"cpu": "x"}, [], {}, [single]), replace(REPORT, rows=[single])
    ):  # fmt: skip
        assert Page(page.render([report])).texts


def test_results_of_earlier_versions_have_pages() -> None:
    folder = Path(page.__file__).parent / "results"
    report = results.Report.load(folder / "2026-11-25-zen4-compiled.json")
    parsed = Page(page.render([report]))
    assert "decoders, training, over torch.compile of the loop, 1 thread" in parsed.of("figcaption")


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.page", None)
    monkeypatch.delattr("benchmarks.page", raising=False)
    REPORT.save(tmp_path / "run.jsonl")
    assert main(["report", str(tmp_path / "run.jsonl"), "--html", str(tmp_path / "page.html")]) == 2
    assert "--html and --png need matplotlib and jinja2" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_settings_change_no_picture() -> None:
    before = svgs()
    with matplotlib.rc_context({"axes.facecolor": "red", "svg.fonttype": "path", "font.size": 30}):
        assert svgs() == before


def svgs() -> list[str]:
    return [plots.svg(plot, "p") for plot in (*plots_roof.rooflines(REPORT), *plots_curves.growth(REPORT)["T"])]


def drawn(plot: plots.Plot) -> Iterator[Any]:
    """Its axes, drawn as a PNG is."""
    with plots._figure(plot) as (figure, _):
        figure.draw_without_rendering()
        yield from figure.axes


def test_maps_have_their_numbers_in_order() -> None:
    grids = {grid.title: grid for grid in plots_heat.grids(REPORT, "auto")}
    (axes,) = drawn(plots_heat.drawn(grids["GRU training, T=50, over torch.nn, 1 thread"]))
    values = {
        (row.case.B, row.case.H): row.ratios[0].median for row in REPORT.rows if row.set == "grid" and "gru" in row.name
    }
    shown = {text.get_position(): text.get_text() for text in axes.texts if text.get_text()[0].isdigit()}
    for (b, h), value in values.items():
        assert shown[(64, 256).index(h), (1, 8).index(b)] == f"{value:.2f}"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["B=1", "B=8"]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0, 2.0, 10.0])
def test_colours_are_centred_on_one(ratio: float) -> None:
    rows = [
        row_of("grid", replace(LAYER, B=b, I=h, H=h), {"auto": [1.0], "torch.nn": [ratio]})
        for b in (1, 2)
        for h in (8, 16)
    ]
    (grid,) = plots_heat.grids(results.Report({}, [], {}, rows), "auto")
    (axes,) = drawn(plots_heat.drawn(grid))
    red, _, blue, _ = axes.collections[0].get_facecolor()[0]
    side = 0 if abs(blue - red) < 0.01 else 1 if blue > red else -1
    assert side == (ratio > 1) - (ratio < 1)


def test_points_lie_under_the_roof_where_they_should() -> None:
    (axes,) = drawn(plots_roof.rooflines(REPORT)[0])
    x, y = (value for value in axes.collections[0].get_offsets()[0])
    row = next(row for row in REPORT.rows if row.set == "grid")
    assert y == pytest.approx(row.case.flops / row.timings["auto"].median * 1e-9)
    (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert low < x < high
    assert bottom < y < top
    (x0, y0), (x1, y1) = axes.transData.transform([(1, 1), (10, 10)])
    assert x1 - x0 == pytest.approx(y1 - y0, rel=0.02)  # what is proportional rises by 45 degrees


def test_growth_follows_what_varies() -> None:
    """H with I, and one curve for each of what else there is."""
    rows = [
        row_of("growth-H", replace(LAYER, op=op, T=t, I=h, H=h), {"auto": [h * 1e-3], "torch.nn": [h * 2e-3]})
        for op in ("lstm", "gru") for t in (32, 64) for h in (32, 64, 128)
    ]  # fmt: skip
    found = plots_curves.growth(results.Report({}, [], {}, rows))["H"]
    assert [plot.title for plot in found] == [
        f"{op}-train-T{t}-B8 by H, 1 thread" for op in ("lstm", "gru") for t in (32, 64)
    ]
    (axes,) = drawn(found[0])
    ours, peer = axes.lines
    assert ours.get_xdata().tolist() == [32, 64, 128]
    assert peer.get_ydata() == pytest.approx([64, 128, 256])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["32", "64", "128"]


def test_a_loss_is_drawn_over_its_seconds() -> None:
    loss, quality = plots_curves.learning(REPORT.recipes[0])
    (axes,) = drawn(loss)
    ours, stock = axes.lines
    assert ours.get_xdata()[-1] == pytest.approx(500)  # 1000 steps, 2 a second
    assert stock.get_xdata()[-1] == pytest.approx(1000)
    assert len(ours.get_xdata()) <= 200
    (axes,) = drawn(quality)
    assert [line.get_label() for line in axes.lines[:2]] == ["fastseq", "torch"]
    unmeasured = replace(REPORT.recipes[0].learners[0], quality=[])
    (axes,) = drawn(plots_curves.learning(replace(REPORT.recipes[0], learners=[unmeasured]))[0])
    assert axes.lines[0].get_xdata()[-1] == 1000  # steps

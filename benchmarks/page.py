"""`python -m benchmarks report FILE... --html page.html`: one page that needs nothing else; `--png DIR`: the README's
pictures.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import plots_bars, plots_curves, plots_heat, plots_roof
from .ceilings import best_of
from .page_tables import HEAD, Cell, Verdict, all_rows, verdict
from .peers import SHOWN
from .plots import PIXELS, Plot, beside, png, svg
from .report import ceilings_table
from .results import Report
from .summary import summaries, under
from .tables import Table
from .targets import IMPORT_S
from .trust import doubts

__all__ = ["pictures", "render", "write"]

TEMPLATES = Path(__file__).parent / "templates"
MACHINE = ("cpu", "isa", "torch")  # of an environment: pictures of several runs need the same


@dataclass(frozen=True)
class Picture:
    """A plot as it stands in the page."""

    caption: str
    wide: int  # pixels
    svg: Markup


@dataclass(frozen=True)
class Group:
    """Pictures that belong together."""

    title: str
    pictures: list[Picture]
    folded: bool = False


@dataclass(frozen=True)
class Article:
    """One run. Where it is in doubt there is no more than where it was measured."""

    name: str
    title: str
    environment: dict[str, str]
    verdict: Verdict
    ceilings: Table
    absent: dict[str, str]
    import_s: str = ""
    summaries: list[Table] = field(default_factory=list)
    heat: list[Group] = field(default_factory=list)
    bars: list[Picture] = field(default_factory=list)
    roof: list[Picture] = field(default_factory=list)
    growth: list[Group] = field(default_factory=list)
    learning: list[Picture] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)


def write(file: Path, reports: Sequence[Report], noisy: bool = False, cited: Sequence[Table] = ()) -> None:
    """The page of these runs. noisy: with the rows of those in doubt. cited: figures that others published."""
    file.write_text(render(reports, noisy, cited), encoding="utf-8")


def render(reports: Sequence[Report], noisy: bool = False, cited: Sequence[Table] = ()) -> str:
    """Its HTML."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    articles = [_article(report, f"run{number}", noisy) for number, report in enumerate(reports, 1)]
    return templates.get_template("page.html").render(
        articles=articles, cited=[table for table in cited if table.lines], head=HEAD, full=2**plots_heat.FULL
    )


def pictures(folder: Path, reports: Sequence[Report]) -> list[Path]:
    """Those of the README, as far as there are rows for them: layers.png, decoders.png, roofline.png.

    Raises ValueError where a run is in doubt, or the runs are of different machines.
    """
    report = _merged(reports)
    found = {
        "layers": (plots_heat.layers(report), 2),
        "decoders": (plots_bars.decoders(report), 1),
        "roofline": (plots_roof.rooflines(report)[:2], 1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (plots, columns) in found.items():
        if plots:
            files.append(folder / f"{name}.png")
            files[-1].write_bytes(png(beside(name, plots, columns)))
    return files


def _merged(reports: Sequence[Report]) -> Report:
    """Of several runs on one machine; of a row that they share, the last."""
    found = [doubt for report in reports for doubt in doubts(report)]
    if found:
        raise ValueError("no pictures, since a run is in doubt: " + "; ".join(found))
    first, *_ = reports
    for name in MACHINE:
        values = dict.fromkeys(report.environment.get(name, "unknown") for report in reports)
        if len(values) > 1:
            raise ValueError(f"runs with {name} {' and '.join(values)}; draw each machine's pictures by themselves")
    rows = {row.key: row for report in reports for row in report.rows}
    return Report(first.environment, best_of(c for r in reports for c in r.ceilings), {}, [*rows.values()])


def _article(report: Report, name: str, noisy: bool) -> Article:
    ids = (f"{name}-{number}-" for number in count())
    e, trust = report.environment, verdict(report, noisy)
    title = ", ".join(filter(None, (e.get("gpu", e.get("cpu", "")), e.get("isa", ""), e.get("date", "")[:10])))
    where = name, title or name, e, trust, ceilings_table(report), report.absent
    if trust.level == "doubt" and not noisy:
        return Article(*where)
    learning = [plot for recipe in report.recipes for plot in plots_curves.learning(recipe)]
    return Article(
        *where,
        _import_time(report),
        summaries(report),
        [*_heat(report, ids)],
        _drawn(plots_bars.decoders(report), ids),
        _drawn([*plots_roof.rooflines(report), *plots_roof.shares(report)], ids),
        [Group(f"over {varies}", _drawn(plots, ids)) for varies, plots in plots_curves.growth(report).items()],
        _drawn(learning, ids),
        all_rows(report),
    )


def _heat(report: Report, ids: Iterator[str]) -> Iterator[Group]:
    """By what ran as ours and by set; folded up where the values are those of a map before."""
    known = set()
    for ours in dict.fromkeys([*SHOWN, *(ratio.ours for row in report.rows for ratio in row.ratios)]):
        for of, members in groupby(plots_heat.grids(report, ours), key=lambda grid: grid.set):
            new = []
            for grid in members:
                key = grid.set, grid.title, tuple(grid.values.items())
                if key not in known:
                    known.add(key)
                    new.append(plots_heat.drawn(grid))
            if new:
                yield Group(
                    of if of == ours else f"{of}, {under(ours)}", _drawn(new, ids), ours not in ("auto", "frozen")
                )


def _drawn(plots: Iterable[Plot], ids: Iterator[str]) -> list[Picture]:
    return [Picture(plot.title, round(plot.size[0] * PIXELS), Markup(svg(plot, next(ids)))) for plot in plots]


def _import_time(report: Report) -> str:
    if report.import_s is None:
        return ""
    return f"import fastseq adds {report.import_s.median:.3f} s to torch's; promised at most {IMPORT_S} s"

"""Where rows stand under the machine's ceilings: the roofline, and each group's share of its bound."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from .cases import LayerCase
from .ceilings import MEMORY, Ceiling
from .growth import AXES
from .plots import INK, LINE, MUTED, SERIES, Canvas, Plot, Tips, in_words, numbered
from .report import quantity
from .results import Report, Row, Timing
from .roofline import bound, intensity
from .stats import median
from .targets import MODES

__all__ = ["rooflines", "shares"]

MARKS = "os^Dv"
BOUNDS = {"products": SERIES[0], "loads": SERIES[1], "waiting": SERIES[4]}
OURS = ("auto", "frozen", "cuda", "triton", "cpu")  # whose time a row is placed by: the first that it has
FLAT = 0.68  # height of the roofline by its width
NEAR = 1.5  # times another rate
SHORT = 1e-6  # of the roof, where the lines of loads begin: left of all rows
WIDE, HIGH, BAR = 5.6, 4.2, 0.23  # inches


class Point(NamedTuple):
    """A row under the roof."""

    series: str
    intensity: float  # FLOP/byte
    rate: float  # GFLOP/s
    tip: str


def rooflines(report: Report) -> list[Plot]:
    """One for each device and number of threads of which there are ceilings."""
    places = dict.fromkeys((row.threads, row.case.device) for row, _ in _timed(report))
    found = [_roofline(report, threads, device) for threads, device in places]
    return [plot for plot in found if plot is not None]


def shares(report: Report) -> list[Plot]:
    """Of each group of rows the share of its bound that ours reaches; one for each number of threads."""
    groups: dict[int, dict[str, list[tuple[float, str, str]]]] = defaultdict(lambda: defaultdict(list))
    for row, timing in _timed(report):
        least = bound(row.case, row.threads, report.ceilings, row.measure == "cold")
        if least is not None:
            share = least.seconds / timing.median
            tip = f"{row.name}: {share:.0%} of what {least.by} allow"
            groups[row.threads][_group(row)].append((share, least.by, tip))
    return [_shares(threads, members) for threads, members in sorted(groups.items())]


def _timed(report: Report) -> list[tuple[Row, Timing]]:
    """Each row, and the time of ours, as users get it."""
    rows = [row for row in report.rows if row.measure != "memory" and row.set != "self"]
    found = [(row, [row.timings[name] for name in OURS if name in row.timings]) for row in rows]
    return [(row, timings[0]) for row, timings in found if timings]


def _roofline(report: Report, threads: int, device: str) -> Plot | None:
    tops = [c for c in report.ceilings if (c.threads, c.device) == (threads, device)]
    rates = [c for c in tops if c.what not in ("load", "copy", "call", "barrier")]
    loads = sorted((c for c in tops if c.what == "load"), key=lambda c: c.size)
    points = [_point(row, t) for row, t in _timed(report) if (row.threads, row.case.device) == (threads, device)]
    points = [point for point in points if point.rate > 0]
    if not rates or not points:
        return None
    series = list(dict.fromkeys(_series(row) for row, _ in _timed(report)))  # in all pictures of a run the same colours

    def draw(canvas: Canvas) -> Tips:
        axes = canvas.add_subplot(xscale="log", yscale="log", xlabel="FLOP/byte", ylabel="GFLOP/s")
        (low, high), (bottom, top) = _limits(points, max(c.value for c in rates) * 1e-9)
        _roof(axes, rates, loads, low, bottom, high)
        tips = _points(axes, points, series)
        axes.set(xlim=(low, high), ylim=(bottom, top), box_aspect=FLAT)
        numbered(axes.xaxis)
        numbered(axes.yaxis)
        canvas.legend(loc="outside lower left", ncols=4, handletextpad=0.2, columnspacing=1.0)
        return tips

    where = "" if device == "cpu" else f", {device}"
    return Plot(f"Roofline, {in_words(threads)}{where}", (WIDE, HIGH), draw)


def _limits(points: Sequence[Point], roof: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Room for all, and a decade as long either way, so that what is proportional rises by 45 degrees."""
    low, high = min(p.intensity for p in points) / 2, max(p.intensity for p in points) * 2
    bottom, top = min(p.rate for p in points) / 2, max(roof, *(p.rate for p in points)) * 2
    wide, tall = math.log10(high / low), math.log10(top / bottom)
    return (high / 10 ** max(wide, tall / FLAT), high), (top / 10 ** max(tall, wide * FLAT), top)


def _point(row: Row, timing: Timing) -> Point:
    rate = row.case.flops / timing.median * 1e-9
    tip = f"{row.set} {row.name}: {quantity(timing, row)}, {rate:.3g} GFLOP/s, {timing.backend}"
    return Point(_series(row), intensity(row.case), rate, tip)


def _series(row: Row) -> str:
    return "growth" if row.set in AXES else row.set


def _roof(
    axes: Axes, rates: Sequence[Ceiling], loads: Sequence[Ceiling], low: float, bottom: float, high: float
) -> None:
    """Products from above; loads from the left, as far as products let them."""
    top = max(c.value for c in rates)
    for c in rates:
        axes.axhline(c.value * 1e-9, color=INK, linewidth=1.4)
        text = f"{c.what} products {c.value * 1e-9:,.0f} GFLOP/s"
        axes.annotate(text, (high, c.value * 1e-9), (-2, 3), textcoords="offset points", ha="right", fontsize=8)
    for c in loads:
        ridge = top / c.value
        axes.plot([ridge * SHORT, ridge], [top * SHORT * 1e-9, top * 1e-9], color=MUTED, linewidth=1.0)
    for text, value in _levels(loads):
        begin = max(low, bottom / value * 1e9)
        if begin < top / value:
            axes.annotate(
                text, (begin, begin * value * 1e-9), (4, 9), textcoords="offset points", fontsize=7.5, color=MUTED,
                rotation=45, rotation_mode="anchor", clip_on=True,
            )  # fmt: skip


def _levels(loads: Sequence[Ceiling]) -> list[tuple[str, float]]:
    """What stands over the lines of loads, and over which; once for lines so near that letters would meet."""
    groups: list[list[Ceiling]] = []
    for c in sorted(loads, key=lambda c: -c.value):
        if groups and c.value * NEAR > groups[-1][0].value:
            groups[-1].append(c)
        else:
            groups.append([c])
    return [(f"{', '.join(map(_level, group))} GB/s", group[0].value) for group in groups]


def _level(c: Ceiling) -> str:
    return f"{'memory' if c.size == MEMORY else f'{c.size / 1024:,.0f} KiB'} {c.value * 1e-9:,.0f}"


def _points(axes: Axes, points: Sequence[Point], series: Sequence[str]) -> Tips:
    tips = {}
    for name in dict.fromkeys(p.series for p in points):
        k, members = series.index(name), [p for p in points if p.series == name]
        marker, colour = MARKS[k // len(SERIES) % len(MARKS)], SERIES[k % len(SERIES)]
        axes.scatter(
            [p.intensity for p in members], [p.rate for p in members], s=20, marker=marker, color=colour, alpha=0.75,
            linewidths=0, label=name, gid=f"points{k}", zorder=3,
        )  # fmt: skip
        tips[f"points{k}"] = [p.tip for p in members]
    return tips


def _group(row: Row) -> str:
    what = row.set
    if row.set in ("grid", "frozen") and isinstance(row.case, LayerCase):
        what = f"{row.set} {row.case.cell.upper()}{' cell' if row.case.is_cell else ''}"
    return f"{what} {MODES[row.case.mode]}"


def _shares(threads: int, groups: dict[str, list[tuple[float, str, str]]]) -> Plot:
    top = max(1.0, *(share for members in groups.values() for share, _, _ in members))

    def draw(canvas: Canvas) -> Tips:
        axes, tips = canvas.add_subplot(), {}
        for y, members in enumerate(groups.values()):
            ((by, _),) = Counter(by for _, by, _ in members).most_common(1)
            axes.barh(y, median([share for share, _, _ in members]), 0.62, color=BOUNDS[by], alpha=0.4)
        for by, colour in BOUNDS.items():
            dots = [(s, y, tip) for y, ms in enumerate(groups.values()) for s, of, tip in ms if of == by]
            if dots:
                across, down, tips[by] = zip(*dots, strict=True)
                axes.scatter(across, down, s=11, color=colour, alpha=0.75, linewidths=0, label=by, gid=by, zorder=3)
        axes.axvline(1, color=INK, linewidth=1.2)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set(xlim=(0, top * 1.03), ylim=(len(groups) - 0.5, -0.5))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_color(LINE)
        axes.tick_params(axis="y", length=0)
        canvas.legend(loc="outside lower left", ncols=3, handletextpad=0.2)
        return tips

    size = WIDE, 0.75 + BAR * len(groups)
    return Plot(f"Share of the bound, {in_words(threads)}", size, draw)

"""How time grows with one dimension at a time, and how trainings learn."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from .growth import Sweep, sweeps
from .peers import PEERS
from .plots import INK, MUTED, SERIES, Canvas, Plot, Tips, in_words, numbered
from .report import quantity
from .results import Learner, Recipe, Report, Timing
from .roofline import bound

__all__ = ["growth", "learning"]

COLOURS = {"auto": SERIES[0], "cpu": SERIES[5], "torch.nn": SERIES[3], "loop": SERIES[3], "onnxruntime": SERIES[2]}
OTHERS = [colour for colour in SERIES if colour not in COLOURS.values()]
SIZE = (3.8, 3.0)  # inches
BINS = 200  # points of a loss's curve


def growth(report: Report) -> dict[str, list[Plot]]:
    """By what varies, a picture of each sweep: the time of each contender."""
    found: dict[str, list[Plot]] = defaultdict(list)
    for sweep in sweeps(report.rows):
        found[sweep.axis].append(_growth(report, sweep))
    return found


def learning(recipe: Recipe) -> list[Plot]:
    """Loss and quality over the seconds of training, ours beside torch's."""
    name = f"{recipe.name}, seed {recipe.seed}"

    def losses(canvas: Canvas) -> Tips:
        axes = canvas.add_subplot(xlabel="seconds of training", ylabel="loss")
        for learner, style in _styled(recipe):
            steps = range(1, len(learner.losses) + 1)
            axes.plot(*_binned([_seconds(learner, step) for step in steps], learner.losses), **style)
        axes.legend()
        return {}

    def quality(canvas: Canvas) -> Tips:
        axes = canvas.add_subplot(xlabel="seconds of training", ylabel=recipe.target)
        for learner, style in _styled(recipe):
            axes.plot([at[0] for at in learner.quality], [at[2] for at in learner.quality], marker="o", ms=3.5, **style)
        axes.axhline(recipe.level, color=MUTED, linewidth=1, linestyle="--")
        axes.legend()
        return {}

    return [Plot(f"{name}: loss", SIZE, losses), Plot(f"{name}: quality", SIZE, quality)]


def _growth(report: Report, sweep: Sweep) -> Plot:
    names = list(dict.fromkeys(name for row in sweep.rows for name in row.timings))
    title = sweep.name if sweep.axis == "threads" else f"{sweep.name}, {in_words(sweep.rows[0].threads)}"

    def draw(canvas: Canvas) -> Tips:
        axes = canvas.add_subplot(xscale="log", yscale="log", xlabel=sweep.axis, ylabel="ms a call")
        tips, others = {}, cycle(OTHERS)
        for name in names:
            at = [(x, row.timings[name]) for x, row in zip(sweep.sizes, sweep.rows, strict=True) if name in row.timings]
            x, (low, y, high) = [x for x, _ in at], ([1e3 * s for s in side] for side in _sides(t for _, t in at))
            colour = COLOURS.get(name) or next(others)
            axes.plot(x, y, color=colour, linewidth=1.6)
            axes.scatter(x, y, s=16, color=colour, label=PEERS[name].label, gid=f"of-{name}", zorder=3)
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            tips[f"of-{name}"] = [f"{name}, {sweep.axis}={n}: {quantity(t, sweep.rows[0])}" for n, t in at]
        _draw_bound(axes, report, sweep)
        _label(axes, sweep.sizes)
        canvas.legend(loc="outside lower left", ncols=2, handletextpad=0.3, columnspacing=1.0)
        return tips

    return Plot(title, SIZE, draw)


def _sides(timings: Iterable[Timing]) -> Iterator[tuple[float, ...]]:
    """The 20 % quantiles, the medians, the 80 % quantiles."""
    return zip(*((t.q20, t.median, t.q80) for t in timings), strict=True)


def _draw_bound(axes: Axes, report: Report, sweep: Sweep) -> None:
    found = [(x, bound(r.case, r.threads, report.ceilings)) for x, r in zip(sweep.sizes, sweep.rows, strict=True)]
    known = [(x, least.seconds * 1e3) for x, least in found if least is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color=INK, linewidth=1, linestyle=":", label="the machine's bound")


def _label(axes: Axes, values: Sequence[int]) -> None:
    """All values across; plain numbers."""
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    numbered(axes.yaxis, (1.0, 2.0, 5.0))


def _styled(recipe: Recipe) -> Iterator[tuple[Learner, dict[str, Any]]]:
    colours = {"fastseq": SERIES[0], "torch": SERIES[3]}
    others = cycle(OTHERS)
    for learner in recipe.learners:
        colour = colours.get(learner.library) or next(others)
        yield learner, {"color": colour, "linewidth": 1.6, "label": learner.library}


def _seconds(learner: Learner, step: int) -> float:
    """Of training at a step, between the moments at which its quality was measured."""
    before = (0.0, 0.0)
    for seconds, steps, _ in learner.quality:
        if step <= steps:
            return before[0] + (seconds - before[0]) * (step - before[1]) / (steps - before[1])
        before = (seconds, steps)
    rate = before[0] / before[1] if before[1] else 1.0  # nothing was measured: steps are all there is
    return step * rate


def _binned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of neighbours, at most BINS of them."""
    size = -(-len(x) // BINS) or 1
    parts = [slice(at, at + size) for at in range(0, len(x), size)]
    return [max(x[part]) for part in parts], [sum(y[part]) / len(y[part]) for part in parts]

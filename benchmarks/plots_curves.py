"""How time grows with one dimension at a time, and how trainings learn."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from .kinds import case_to_dict
from .peers import PEERS
from .plots import INK, MUTED, SERIES, Canvas, Plot, Tips, numbered
from .report import MIB, quantity
from .results import Learner, Recipe, Report, Row
from .roofline import bound

__all__ = ["GROWTH", "growth", "learning"]

GROWTH = "growth-"  # sets so named vary what follows: an attribute of the case, or the threads
TIED = {"H": "I", "T": "S", "S": "T"}  # of a case: what may grow along
COLOURS = {"auto": SERIES[0], "cpu": SERIES[5], "torch.nn": SERIES[3], "loop": SERIES[3], "onnxruntime": SERIES[2]}
OTHERS = [colour for colour in SERIES if colour not in COLOURS.values()]
SIZE = (3.8, 3.0)  # inches
BINS = 200  # points of a loss's curve


class Curve(NamedTuple):
    """Rows that differ in one dimension."""

    set: str
    rows: list[tuple[int, Row]]  # by what varies

    @property
    def title(self) -> str:
        """What its rows have in common."""
        (_, first), *others = self.rows
        names = [str(row.case).split("-") for _, row in others]
        common = [word for word in str(first.case).split("-") if all(word in name for name in names)]
        threads = "" if self.varies == "threads" else f", {first.threads} thread{'s' if first.threads > 1 else ''}"
        return f"{' '.join(common)}{threads}"

    @property
    def varies(self) -> str:
        return self.set.removeprefix(GROWTH)


def growth(report: Report) -> dict[str, list[Plot]]:
    """By what varies, a picture for each case of the sets `growth-...`: the time of each contender."""
    found: dict[str, list[Plot]] = defaultdict(list)
    for curve in _curves(report.rows):
        if len(curve.rows) > 1:
            found[curve.varies].append(_growth(report, curve))
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


def _curves(rows: Sequence[Row]) -> list[Curve]:
    """Rows of a set are of one curve where all but what varies, and what is as large in all of them, is the same."""
    alike: dict[tuple[str, tuple[Any, ...]], list[tuple[int, Row]]] = defaultdict(list)
    for row in rows:
        if row.set.startswith(GROWTH):
            words = [value for value in case_to_dict(row.case).values() if isinstance(value, str | bool)]
            threads = None if row.set == f"{GROWTH}threads" else row.threads
            alike[row.set, (row.measure, threads, *words)].append((_value(row), row))
    curves: dict[tuple[Any, ...], list[tuple[int, Row]]] = defaultdict(list)
    for (of, words_of), members in alike.items():
        varies = of.removeprefix(GROWTH)
        tied = TIED.get(varies, "")
        grown = {varies, *([tied] if all(getattr(row.case, tied, None) == x for x, row in members) else [])}
        for x, row in members:
            fixed = tuple(v for name, v in case_to_dict(row.case).items() if name not in grown)
            curves[of, words_of, fixed].append((x, row))
    return [Curve(of, sorted(found, key=lambda at: at[0])) for (of, *_), found in curves.items()]


def _value(row: Row) -> int:
    """Of what varies. Raises ValueError where the case has no such dimension."""
    varies = row.set.removeprefix(GROWTH)
    value = row.threads if varies == "threads" else getattr(row.case, varies, None)
    if not isinstance(value, int):
        raise ValueError(f"set {row.set!r}: {row.case} has no {varies}; name the set after a dimension, as in growth-T")
    return value


def _growth(report: Report, curve: Curve) -> Plot:
    names = list(dict.fromkeys(name for _, row in curve.rows for name in row.timings))
    memory = curve.rows[0][1].measure == "memory"
    scale = 1 / MIB if memory else 1e3
    if all(row.timings.get("cpu") in (None, row.timings.get("auto")) for _, row in curve.rows):
        names = [name for name in names if name != "cpu"]  # the same measurements

    def draw(canvas: Canvas) -> Tips:
        axes, tips, others = canvas.add_subplot(xscale="log", yscale="log"), {}, cycle(OTHERS)
        for name in names:
            at = [(x, row, row.timings[name]) for x, row in curve.rows if name in row.timings]
            x, y = [x for x, _, _ in at], [timing.median * scale for _, _, timing in at]
            colour = COLOURS.get(name) or next(others)
            axes.plot(x, y, color=colour, linewidth=1.6)
            axes.scatter(x, y, s=16, color=colour, label=PEERS[name].label, gid=f"of-{name}", zorder=3)
            axes.fill_between(
                x, [t.q20 * scale for *_, t in at], [t.q80 * scale for *_, t in at], color=colour, alpha=0.2, lw=0
            )
            tips[f"of-{name}"] = [f"{name}, {curve.varies}={x}: {quantity(timing, row)}" for x, row, timing in at]
        if not memory:
            _draw_bound(axes, report, curve)
        _label(axes, [x for x, _ in curve.rows])
        axes.set(xlabel=curve.varies, ylabel="MiB" if memory else "ms a call")
        canvas.legend(loc="outside lower left", ncols=2, handletextpad=0.3, columnspacing=1.0)
        return tips

    return Plot(curve.title, SIZE, draw)


def _draw_bound(axes: Axes, report: Report, curve: Curve) -> None:
    found = [(x, bound(r.case, r.threads, report.ceilings, r.measure == "cold")) for x, r in curve.rows]
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

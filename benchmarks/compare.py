"""Two runs beside each other. A ratio to a peer hardly knows how fast the machine is: where its whole 95 % interval
fell by more than the tolerance, ours became slower, or the peer faster. Times alone are told of, and held to nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .ceilings import unit
from .report import interval, quantity
from .results import Ratio, Report, Row, Timing
from .run import IN_DOUBT
from .stats import geometric_mean
from .tables import Table, print_table
from .trust import AGAIN, disturbed, doubts

__all__ = ["TOLERANCE", "Change", "Comparison", "compare", "print_comparison"]

TOLERANCE = 0.05  # two runs of one program differ by as much where memory happens to lie otherwise
SHOULD_SHOW = 1.2  # a slowdown that a measurement is meant to tell
DRIFT = 0.1  # of a ceiling: not the same machine, or not the same clock
SAME = ("cpu", "isa", "caches", "gpu", "software", "torch", "onnxruntime", "python", "system")  # of an environment
FEW = 8  # names in a line


class Pair(NamedTuple):
    """A contender's row or ratio in either run."""

    before: Row
    after: Row


@dataclass(frozen=True)
class Change:
    """Of one ratio."""

    ours: str  # every contender that this was the measurement of: "auto, cpu"
    rows: Pair
    before: Ratio
    after: Ratio

    @property
    def factor(self) -> float:
        return self.after.median / self.before.median

    def worse(self, tolerance: float) -> bool:
        """The whole interval fell by more. NaN is worse."""
        return not self.after.high >= (1 - tolerance) * self.before.low

    def better(self, tolerance: float) -> bool:
        return self.after.low * (1 - tolerance) > self.before.high

    def blind(self, tolerance: float) -> bool:
        """The intervals are so wide that a slowdown by SHOULD_SHOW would not be told."""
        top = self.before.median / SHOULD_SHOW * self.after.high / self.after.median
        return top >= (1 - tolerance) * self.before.low


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common, and what not."""

    tolerance: float
    changes: list[Change] = field(default_factory=list)
    only_before: list[str] = field(default_factory=list)
    only_after: list[str] = field(default_factory=list)
    disturbed: list[str] = field(default_factory=list)  # rows, left out
    differences: list[str] = field(default_factory=list)  # of the machines and versions

    @property
    def worse(self) -> list[Change]:
        return sorted((c for c in self.changes if c.worse(self.tolerance)), key=lambda c: c.factor)

    @property
    def better(self) -> list[Change]:
        return sorted((c for c in self.changes if c.better(self.tolerance)), key=lambda c: -c.factor)


def compare(before: Report, after: Report, tolerance: float = TOLERANCE, noisy: bool = False) -> Comparison:
    """Row by row, ratio by ratio. `noisy`: disturbed rows, too.

    Raises ValueError where the tolerance is no share, or there is nothing to compare.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance {tolerance}; a share of the ratio, 0 or more and below 1, as in 0.05")
    found = Comparison(tolerance, differences=[*_differences(before, after)])
    old, new = ({row.key: row for row in report.rows} for report in (before, after))
    for key in dict.fromkeys([*old, *new]):
        if key not in new or key not in old:
            (found.only_before if key in old else found.only_after).append(_named(old.get(key) or new[key]))
        elif not noisy and (disturbed(old[key]) or disturbed(new[key])):
            found.disturbed.append(_named(old[key]))
        else:
            _compare_rows(Pair(old[key], new[key]), found)
    if not found.changes:
        raise ValueError(f"nothing to compare: {', '.join(_left_out(found)) or 'no ratios'}; run the same --set twice")
    return found


def print_comparison(before: Report, after: Report, tolerance: float, noisy: bool) -> int:
    """Tables of what changed, and what could not be compared; the exit status: 1 where anything became worse."""
    found = [f"{when}: {doubt}" for when, r in (("before", before), ("after", after)) for doubt in doubts(r)]
    if found:
        print("\n".join([f"{'In doubt' if noisy else 'Not compared, since a run is in doubt'}:", *found]))
        if not noisy:
            print("Run it again on a quiet machine; --noisy compares what there is.")
            return IN_DOUBT
    compared = compare(before, after, tolerance, noisy)
    print("\n".join([*compared.differences, *_left_out(compared)]))
    for title, changes in (("worse", compared.worse), ("better", compared.better)):
        print_table(_changes_table(title, changes))
    print_table(_times_table(compared))
    blind = sum(c.blind(tolerance) for c in compared.changes)
    print(
        f"{len(compared.changes)} ratios compared: by more than {tolerance:.0%} {len(compared.worse)} are worse and"
        f" {len(compared.better)} better; {blind} vary so much that a slowdown by {SHOULD_SHOW - 1:.0%} would not show"
    )
    return 1 if compared.worse else 0


def _compare_rows(rows: Pair, found: Comparison) -> None:
    """Where `auto` ran the kernels, what was measured for both is one change."""
    old, new = ({(r.ours, r.peer): r for r in row.ratios if not r.peer.endswith(AGAIN)} for row in rows)
    shared: dict[tuple[object, ...], list[str]] = {}
    for pair in dict.fromkeys([*old, *new]):
        if pair in old and pair in new:
            same = *(row.timings[pair[0]] for row in rows), pair[1]
            shared.setdefault(same, []).append(pair[0])
        else:
            (found.only_before if pair in old else found.only_after).append(f"{_named(rows.before)} {' / '.join(pair)}")
    for (*_, peer), ours in shared.items():
        pair = ours[0], str(peer)
        found.changes.append(Change(", ".join(ours), rows, old[pair], new[pair]))


def _named(row: Row) -> str:
    return f"{row.set} {row.name}"


def _differences(before: Report, after: Report) -> Iterator[str]:
    """Between machines, versions and numbers of threads; last those of the ceilings, which no name tells."""
    for name in SAME:
        old, new = (report.environment.get(name, "unknown") for report in (before, after))
        if old != new:
            yield f"{name} differs: {old} -> {new}"
    old, new = (", ".join(map(str, sorted({row.threads for row in r.rows}))) for r in (before, after))
    if old != new:
        yield f"threads differ: {old} -> {new}"
    tops = {(c.what, c.threads, c.device, c.size): c.value for c in before.ceilings}
    for c in after.ceilings:
        known = tops.get((c.what, c.threads, c.device, c.size))
        if known is not None and not abs(c.value / known - 1) <= DRIFT:
            name = f"{c.what}{f' {c.size:,} B' if c.size else ''} at {c.threads} thread{'s' * (c.threads != 1)}"
            yield f"another machine, or another clock: ceiling of {name} {known:.3g} -> {c.value:.3g} {unit(c.what)}"


def _left_out(found: Comparison) -> Iterator[str]:
    for what, names in (
        ("only before", found.only_before), ("only after", found.only_after), ("disturbed", found.disturbed),
    ):  # fmt: skip
        if names:
            more = [f"and {len(names) - FEW} more"] if len(names) > FEW else []
            yield f"{what}, {len(names)}: {'; '.join([*names[:FEW], *more])}"


def _changes_table(title: str, changes: Iterable[Change]) -> Table:
    lines = []
    for c in changes:
        (old, new), (ours, peer) = c.rows, (c.before.ours, c.before.peer)
        ran = [row.timings[ours].backend for row in c.rows]
        lines.append([
            _named(old), c.ours if ran[0] == ran[1] else f"{c.ours}: {ran[0]} -> {ran[1]}", peer,
            f"{interval(c.before)} -> {interval(c.after)}", f"{c.factor - 1:+.1%}",
            f"{quantity(old.timings[ours], old)} -> {quantity(new.timings[ours], new)}",
            f"x {_by(c.rows, ours):.2f}", f"x {_by(c.rows, peer):.2f}",
        ])  # fmt: skip
    head = ("row", "ours", "peer", "ratio [95 % interval]", "change", "ours", "that is", "the peer's")
    return Table(f"{title}: the ratio's whole interval moved by more than the tolerance", head, lines)


def _by(rows: Pair, name: str) -> float:
    """The factor by which a contender's time, or memory, changed."""
    return rows.after.timings[name].median / rows.before.timings[name].median


def _times_table(found: Comparison) -> Table:
    """By contender and threads, how times and memory changed by themselves."""
    moved: dict[tuple[str, int, str], dict[tuple[str, ...], tuple[Timing, Timing]]] = {}
    for c in found.changes:
        for name in (c.before.ours, c.before.peer):
            key = name, c.rows.before.threads, "memory" if c.rows.before.measure == "memory" else "time"
            timings = c.rows.before.timings[name], c.rows.after.timings[name]
            moved.setdefault(key, {})[c.rows.before.key] = timings
    lines = [
        [name, str(threads), what, str(len(pairs)), *_moves([*pairs.values()], found.tolerance)]
        for (name, threads, what), pairs in moved.items()
    ]
    head = ("contender", "threads", "", "rows", "geometric mean", "more", "less")
    return Table(
        "times and memory by themselves, after over before: the machine's part is in them", head, sorted(lines)
    )


def _moves(pairs: Sequence[tuple[Timing, Timing]], tolerance: float) -> tuple[str, str, str]:
    """The mean factor; how many 20 % to 80 % ranges lie apart by more than the tolerance, upwards and downwards."""
    up = sum(new.q20 * (1 - tolerance) > old.q80 for old, new in pairs)
    down = sum(new.q80 < (1 - tolerance) * old.q20 for old, new in pairs)
    return f"x {geometric_mean([new.median / old.median for old, new in pairs]):.3f}", str(up), str(down)

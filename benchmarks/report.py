"""The tables of a run."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from .registry import OURS
from .results import Ratio, Report, Row, Timing
from .stats import geometric_mean
from .tables import Table, print_table
from .targets import IMPORT_S, TARGETS, group

__all__ = ["disturbed", "print_report", "row_line", "summary_table"]

SCALES = ((1.0, "s "), (1e-3, "ms"), (1e-6, "us"))
MIB = 2.0**20
RARELY = 0.2  # of a row's rounds


def disturbed(row: Row) -> bool:
    """Somebody else slowed nearly all its rounds."""
    return row.calm < RARELY


def print_report(report: Report, rows: bool = True) -> None:
    """Where it was measured, each row under `auto` and with the kernels forced, and each group beside its target."""
    print("\n".join(f"{name:<12} {value}" for name, value in report.environment.items()))
    ceilings = [[f"{c.dtype}, threads: {c.threads}", f"{c.gflops:.0f}", c.by] for c in report.ceilings]
    print_table(Table("ceilings", ("", "GFLOP/s", "reached by"), ceilings))
    for ours in OURS:
        if rows:
            print_table(rows_table(report, ours))
        print_table(summary_table(report.rows, ours))
    noisy = sum(map(disturbed, report.rows))
    if noisy:
        print(
            f"disturbed: {noisy} of {len(report.rows)} rows; other programs, or other machines on this CPU, slowed them"
        )
    if report.import_s is not None:
        print(f"import fastseq adds {report.import_s.median:.3f} s to torch's; promised at most {IMPORT_S} s")
    for peer, reason in report.absent.items():
        print(f"left out: {peer}: {reason}")


def rows_table(report: Report, ours: str) -> Table:
    """Every row of `ours`: what ran, its time, its share of the ceiling, and each peer's ratio."""
    lines = []
    for row in report.rows:
        if ours in row.timings:
            mine, ratios = row.timings[ours], _of(row, ours)
            against = "  ".join(f"{r.peer} {_ratio(r)}" for r in ratios)
            speed = _gflops(row, mine), _share(report, row, mine)
            lines.append([row.name, mine.backend, _quantity(mine, row), *speed, f"{row.calm:.0%}", against])
    head = ("case", "ran", "median [20 %, 80 %]", "GFLOP/s", "ceiling", "calm", "ratio [95 % interval]")
    return Table(f"rows, {_title(ours)}", head, lines)


def summary_table(rows: Iterable[Row], ours: str) -> Table:
    """Geometric mean and minimum of each group, for each number of threads and for all, beside the target."""
    groups: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for ratio in _of(row, ours):
            groups[group(row, ratio)][row.threads].append(ratio.median)
    threads = sorted({n for by_threads in groups.values() for n in by_threads})
    lines = [
        [name, *_group_cells(by_threads, threads), *_verdict(name, by_threads)] for name, by_threads in groups.items()
    ]
    columns = [f"{word} {n}t" for n in threads for word in ("mean", "min")]
    return Table(f"summary, {_title(ours)}", ("group", "rows", *columns, "mean", "min", "promised", ""), lines)


def row_line(row: Row) -> str:
    """One row while the run goes on."""
    shown: dict[str, Timing] = {}
    for name, timing in row.timings.items():
        if timing not in shown.values():  # `cpu` where `auto` ran just that
            shown[name] = timing
    times = [
        f"{name}{'' if name == t.backend else f'={t.backend}'} {_quantity(t, row)} {t.note}".rstrip()
        for name, t in shown.items()
    ]
    head = row.name if row.calm == 1 else f"{row.name} (calm {row.calm:.0%})"
    return "  ".join([head, *times, *(f"{r.peer}/{r.ours} {_ratio(r)}" for r in row.ratios if r.ours in shown)])


def _title(ours: str) -> str:
    return "under auto" if ours == "auto" else f'with backend="{ours}"'


def _of(row: Row, ours: str) -> list[Ratio]:
    return [ratio for ratio in row.ratios if ratio.ours == ours]


def _group_cells(by_threads: dict[int, list[float]], threads: Iterable[int]) -> Iterator[str]:
    yield str(sum(map(len, by_threads.values())))
    for n in threads:
        values = by_threads.get(n)
        yield from ("", "") if values is None else (f"{geometric_mean(values):.2f}", f"{min(values):.2f}")


def _verdict(name: str, by_threads: dict[int, list[float]]) -> list[str]:
    values = [v for by in by_threads.values() for v in by]
    mean, least = geometric_mean(values), min(values)
    target = TARGETS.get(name)
    if target is None:
        return [f"{mean:.2f}", f"{least:.2f}", "", ""]
    wanted = [f"{word} {t:.2f}" for word, t in (("mean", target.mean), ("min", target.least)) if t is not None]
    kept = mean >= (target.mean or 0) and least >= (target.least or 0)
    return [f"{mean:.2f}", f"{least:.2f}", ", ".join(wanted), "kept" if kept else "MISSED"]


def _quantity(timing: Timing, row: Row) -> str:
    if row.measure == "memory":
        return f"{timing.median / MIB:.2f} MiB"
    scale, unit = next((s for s in SCALES if timing.median >= s[0]), SCALES[-1])
    return f"{timing.median / scale:.3g} {unit} [{timing.q20 / scale:.3g}, {timing.q80 / scale:.3g}]"


def _gflops(row: Row, timing: Timing) -> str:
    return f"{row.case.flops / timing.median * 1e-9:.1f}" if row.measure == "time" else ""


def _share(report: Report, row: Row, timing: Timing) -> str:
    dtype = "float32" if row.case.dtype == "float32" else "bfloat16"
    top = next((c.gflops for c in report.ceilings if (c.dtype, c.threads) == (dtype, row.threads)), None)
    return "" if top is None or row.measure != "time" else f"{row.case.flops / timing.median * 1e-7 / top:.0f} %"


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"

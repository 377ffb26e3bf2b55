"""The tables of a run."""

from .ceilings import MEMORY, Ceiling, unit
from .cited import cited_tables
from .peers import SHOWN
from .results import Ratio, Report, Row, Timing
from .roofline import bound
from .summary import promise, ratios_of, summaries, under
from .tables import Table, print_table
from .targets import IMPORT_S
from .trust import disturbed, doubts, selves

__all__ = ["ceilings_table", "interval", "print_report", "quantity", "rates", "row_line", "rows_table"]

SCALES = ((1.0, "s "), (1e-3, "ms"), (1e-6, "us"))
MIB = 2.0**20
SLOW_FIRST_S = 0.05  # a first call to be told of: it compiled


def print_report(report: Report, rows: bool = True, whatever: bool = False) -> bool:
    """Where it was measured, each row under `auto`, with the kernels forced, frozen; what was left out; summaries; with
    the rows what others published.

    No tables where there are doubts, but `whatever` the doubts; whether they were printed.
    """
    print("\n".join(f"{name:<12} {value}" for name, value in report.environment.items()))
    print_table(ceilings_table(report))
    for what, reason in report.absent.items():
        print(f"left out: {what}: {reason}")
    found = doubts(report)
    if found:
        print("\n".join([f"\nThis run is {'in doubt' if whatever else 'not reported'}:", *found]))
        if not whatever:
            print("Run it again on a quiet machine; `report --noisy FILE` prints what it measured.")
            return False
    elif count := sum(1 for _ in selves(report.rows)):
        noisy = sum(map(disturbed, report.rows))
        print(f"each of {count} contenders against itself came out as 1; {noisy} rows were disturbed")
    for ours in SHOWN if rows else ():
        print_table(rows_table(report, ours))
    if report.import_s is not None:
        print(f"import fastseq adds {report.import_s.median:.3f} s to torch's; promised at most {IMPORT_S} s")
    for table in [*summaries(report), *(cited_tables() if rows else ())]:
        print_table(table)
    return True


def ceilings_table(report: Report) -> Table:
    """What the machine can do at most."""
    lines = [
        [_of_level(c), c.device, str(c.threads), f"{c.value / 10**power:.3g} {prefix}{unit(c.what)}", c.by]
        for c in report.ceilings
        for power, prefix in [(-6, "u") if unit(c.what) == "s" else (9, "G")]
    ]
    return Table("ceilings", ("", "device", "threads", "at best", "by"), lines)


def _of_level(ceiling: Ceiling) -> str:
    if ceiling.what != "load":
        return ceiling.what
    return "load from memory" if ceiling.size == MEMORY else f"load from {ceiling.size / 1024:,.0f} KiB"


def rows_table(report: Report, ours: str) -> Table:
    """Every row of `ours`: what ran, its time, its rates, its share of the bound, each peer's ratio, its target."""
    lines = []
    for row in report.rows:
        if ours in row.timings:
            mine, ratios = row.timings[ours], ratios_of(row, ours)
            against = "  ".join(f"{r.peer} {interval(r)}" for r in ratios)
            targets = "; ".join(filter(None, (promise(report, row, r) for r in ratios)))
            calm = "" if row.calm is None else f"{row.calm:.0%}"
            lines.append(
                [row.name, mine.backend, quantity(mine, row), *rates(report, row, mine), calm, against, targets]
            )
    head = (
        "case", "ran", "median [20 %, 80 %]", "tokens/s", "GFLOP/s", "of the bound", "calm", "ratio [95 % interval]",
        "target",
    )  # fmt: skip
    return Table(f"rows, {under(ours)}", head, lines)


def row_line(row: Row) -> str:
    """One row while the run goes on."""
    shown: dict[str, Timing] = {}
    for name, timing in row.timings.items():
        if timing not in shown.values():  # `cpu` where `auto` ran just that
            shown[name] = timing
    times = [
        f"{name}{'' if name == t.backend else f'={t.backend}'} {quantity(t, row)} {_about(t)}".rstrip()
        for name, t in shown.items()
    ]
    head = row.name if row.calm in (None, 1) else f"{row.name} (calm {row.calm:.0%})"
    return "  ".join([head, *times, *(f"{r.peer}/{r.ours} {interval(r)}" for r in row.ratios if r.ours in shown)])


def _about(timing: Timing) -> str:
    first = [f"first call {timing.first:.2f} s"] if timing.first > max(SLOW_FIRST_S, 10 * timing.median) else []
    return "; ".join([*first, *([timing.note] if timing.note else [])])


def quantity(timing: Timing, row: Row) -> str:
    """The median, of times also the quantiles."""
    if row.measure == "memory":
        return f"{timing.median / MIB:.2f} MiB"
    scale, unit = next((s for s in SCALES if timing.median >= s[0]), SCALES[-1])
    return f"{timing.median / scale:.3g} {unit} [{timing.q20 / scale:.3g}, {timing.q80 / scale:.3g}]"


def rates(report: Report, row: Row, timing: Timing) -> tuple[str, str, str]:
    """Tokens/s, GFLOP/s, and the share of the machine's bound, with what that is."""
    if row.measure == "memory":
        return "", "", ""
    least = bound(row.case, row.threads, report.ceilings, row.measure == "cold")
    share = "" if least is None else f"{least.seconds / timing.median:.0%} {least.by}"
    return f"{row.case.tokens / timing.median:,.0f}", f"{row.case.flops / timing.median * 1e-9:.1f}", share


def interval(ratio: Ratio) -> str:
    """The median and its interval."""
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"

"""The tables of a run."""

from .registry import SHOWN
from .results import Ratio, Report, Row, Timing
from .summary import ceiling_of, promise, ratios_of, summaries, under
from .tables import Table, print_table
from .targets import IMPORT_S

__all__ = ["disturbed", "print_report", "row_line"]

SCALES = ((1.0, "s "), (1e-3, "ms"), (1e-6, "us"))
MIB = 2.0**20
RARELY = 0.2  # of a row's rounds


def disturbed(row: Row) -> bool:
    """Somebody else slowed nearly all its rounds."""
    return row.calm is not None and row.calm < RARELY


def print_report(report: Report, rows: bool = True) -> None:
    """Where it was measured, each row under `auto`, with the kernels forced, frozen; what was left out; summaries."""
    print("\n".join(f"{name:<12} {value}" for name, value in report.environment.items()))
    ceilings = [[f"{c.dtype}, threads: {c.threads}", f"{c.gflops:.0f}", c.by] for c in report.ceilings]
    print_table(Table("ceilings", ("", "GFLOP/s", "reached by"), ceilings))
    for ours in SHOWN if rows else ():
        print_table(rows_table(report, ours))
    noisy = sum(map(disturbed, report.rows))
    if noisy:
        print(
            f"disturbed: {noisy} of {len(report.rows)} rows; other programs, or other machines on this CPU, slowed them"
        )
    if report.import_s is not None:
        print(f"import fastseq adds {report.import_s.median:.3f} s to torch's; promised at most {IMPORT_S} s")
    for what, reason in report.absent.items():
        print(f"left out: {what}: {reason}")
    for table in summaries(report):
        print_table(table)


def rows_table(report: Report, ours: str) -> Table:
    """Every row of `ours`: what ran, its time, its rates, its share of the ceiling, each peer's ratio, its target."""
    lines = []
    for row in report.rows:
        if ours in row.timings:
            mine, ratios = row.timings[ours], ratios_of(row, ours)
            against = "  ".join(f"{r.peer} {_ratio(r)}" for r in ratios)
            targets = "; ".join(filter(None, (promise(report, row, r) for r in ratios)))
            rates = _rates(report, row, mine)
            calm = "" if row.calm is None else f"{row.calm:.0%}"
            lines.append([row.name, mine.backend, _quantity(mine, row), *rates, calm, against, targets])
    head = (
        "case", "ran", "median [20 %, 80 %]", "tokens/s", "GFLOP/s", "ceiling", "calm", "ratio [95 % interval]",
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
        f"{name}{'' if name == t.backend else f'={t.backend}'} {_quantity(t, row)} {_about(t)}".rstrip()
        for name, t in shown.items()
    ]
    head = row.name if row.calm in (None, 1) else f"{row.name} (calm {row.calm:.0%})"
    return "  ".join([head, *times, *(f"{r.peer}/{r.ours} {_ratio(r)}" for r in row.ratios if r.ours in shown)])


def _about(timing: Timing) -> str:
    first = [f"first call {timing.first:.2f} s"] if timing.first else []
    return "; ".join([*first, *([timing.note] if timing.note else [])])


def _quantity(timing: Timing, row: Row) -> str:
    if row.measure == "memory":
        return f"{timing.median / MIB:.2f} MiB"
    scale, unit = next((s for s in SCALES if timing.median >= s[0]), SCALES[-1])
    return f"{timing.median / scale:.3g} {unit} [{timing.q20 / scale:.3g}, {timing.q80 / scale:.3g}]"


def _rates(report: Report, row: Row, timing: Timing) -> tuple[str, str, str]:
    """Tokens/s, GFLOP/s, and the latter's share of the ceiling."""
    if row.measure != "time":
        return "", "", ""
    rate, ceiling = row.case.flops / timing.median, ceiling_of(report, row)
    share = "" if ceiling is None else f"{rate / ceiling * 100:.0f} %"
    return f"{row.case.tokens / timing.median:,.0f}", f"{rate * 1e-9:.1f}", share


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"

"""The table of the packages in docs/replace.md: no figure there is typed by hand."""

from pathlib import Path

from .results import Report, Row

__all__ = ["PAGE", "line", "table", "write"]

PAGE = Path(__file__).parents[2] / "docs" / "replace.md"
BEGIN, END = "<!-- foreign:begin -->", "<!-- foreign:end -->"


def write(report: Report, page: Path = PAGE) -> None:
    """Replace what stands between the page's markers; ValueError unless each is there once, in this order."""
    text = page.read_text()
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{page} needs one {BEGIN} and, behind it, one {END}")
    head, rest = text.split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{table(report)}\n{END}{rest.split(END)[1]}")


def table(report: Report) -> str:
    """Markdown."""
    e = report.environment
    origin = f"{e['cpu']}, `{e['isa']}`, torch {e['torch']}, one thread, {e['date'][:10]}; `{e['command']}`."
    rounds = " or ".join(map(str, sorted({row.rounds for row in report.rows})))
    lines = [
        f"{origin} Ratio: stock's CPU seconds over fastseq's, median and 20 % to 80 % of {rounds} rounds.",
        "",
        "| program | by | stock, s | fastseq, s | ratio | losses differ by (budget) | parameters differ by (budget) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*lines, *map(line, report.rows)])


def line(row: Row) -> str:
    """Of the table."""
    ratio = f"**{row.ratio.median:.2f}** ({row.ratio.q20:.2f} to {row.ratio.q80:.2f})"
    d = row.deviation
    equal = f"{d.losses:.0e} ({d.losses_budget:.0e}) | {d.tensors:.0e} ({d.tensors_budget:.0e})"
    program = f"{row.distribution} {row.version}, {row.what}"
    return f"| {program} | `{row.way}` | {row.stock.median:.2f} | {row.fastseq.median:.2f} | {ratio} | {equal} |"

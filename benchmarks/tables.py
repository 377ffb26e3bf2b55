"""A table: on the terminal by rich where it is installed, otherwise as plain text; or as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

try:
    import rich.box
    import rich.console
    import rich.table
    import rich.text
except ImportError:
    rich = None  # type: ignore[assignment]

__all__ = ["Table", "markdown", "plain", "print_table"]


@dataclass(frozen=True)
class Table:
    """Text cells; the first column is aligned left, the others right."""

    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]


def print_table(table: Table) -> None:
    """Nothing where there are no lines."""
    if not table.lines:
        return
    if rich is None:
        print(f"\n{plain(table)}")
        return
    drawn = rich.table.Table(title=table.title, box=rich.box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for k, name in enumerate(table.head):
        drawn.add_column(name, justify="right" if k else "left", no_wrap=True)
    for line in table.lines:
        drawn.add_row(*map(rich.text.Text, line))
    console = rich.console.Console()
    if not console.is_terminal:  # a file has no width: nothing is cut
        console = rich.console.Console(width=max(map(len, plain(table).splitlines())) + 4 * len(table.head))
    console.print(drawn)


def plain(table: Table) -> str:
    """Columns two spaces apart under the title."""
    widths = [max(map(len, column)) for column in zip(table.head, *table.lines, strict=True)]
    lines = [
        "  ".join(cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in (table.head, *table.lines)
    ]
    return "\n".join([table.title, *(line.rstrip() for line in lines)])


def markdown(table: Table) -> str:
    """The title as a line of its own, since Markdown's tables have none."""
    rule = ["---", *["---:"] * (len(table.head) - 1)]
    rows = [f"| {' | '.join(cells)} |" for cells in (table.head, rule, *table.lines)]
    return "\n".join([f"{table.title[0].upper()}{table.title[1:]}:", "", *rows])

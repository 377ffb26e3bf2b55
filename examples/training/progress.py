"""How a run is going: a live bar in a terminal, a line every ten seconds elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .loop import Status


class Display:
    """Shows each Status given to it while the context is open."""

    def __init__(self, console: Console, interval: float = 10.0) -> None:
        self.console, self.interval, self.printed = console, interval, time.perf_counter()
        columns = (BarColumn(bar_width=30), TextColumn("{task.percentage:3.0f} %  {task.fields[text]}"))
        self.bar = Progress(*columns, console=console, refresh_per_second=4) if console.is_terminal else None
        if self.bar is not None:
            self.task = self.bar.add_task("", total=1.0, text="")

    def __enter__(self) -> "Display":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, status: Status) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=status.done, text=describe(status))
        elif time.perf_counter() - self.printed >= self.interval or status.done == 1:
            self.printed = time.perf_counter()
            self.console.print(f"{status.done:4.0%}  {describe(status)}", highlight=False)


def describe(status: Status) -> str:
    dev = "" if status.dev is None else f"  dev {status.dev.brief}"
    return (
        f"epoch {status.epoch:.1f}  loss {status.loss:.3f}{dev}  {status.speed:,.0f} words/s  "
        f"{int(status.left) // 60}:{int(status.left) % 60:02d} left"
    )

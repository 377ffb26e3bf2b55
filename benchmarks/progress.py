"""How far a run is: a bar below its lines in a terminal where rich is installed, numbered lines elsewhere."""

import sys
from types import TracebackType

try:
    import rich.console
    import rich.progress
    import rich.text
except ImportError:
    rich = None  # type: ignore[assignment]

__all__ = ["Progress"]


class Progress:
    """Called with the line of each thing that is done, or None where there is nothing to say of it."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        console = None if rich is None else rich.console.Console(stderr=True)
        self._bar = None
        if console is not None and console.is_terminal:
            columns = (
                rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn(),
                rich.progress.TextColumn("left"), rich.progress.TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = rich.progress.Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, line: str | None) -> None:
        self._done += 1
        if self._bar is not None:
            if line is not None:
                self._bar.console.print(rich.text.Text(line))
            self._bar.advance(self._task)
        elif line is not None:
            print(f"{self._done}/{self._total} {line}", file=sys.stderr, flush=True)

"""One row to be measured."""

from dataclasses import dataclass

from .cases import Case

__all__ = ["Entry", "Pairs"]

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Entry:
    """One row: a case, and which contenders (ours, peer) are compared. ratio = the peer's / ours."""

    set: str
    case: Case
    pairs: Pairs
    threads: tuple[int, ...] | None = None  # None: whatever the user asks for
    measure: str = "time"  # "cold": with empty caches; "memory": peak bytes of a call

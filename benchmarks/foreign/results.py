"""What was measured of a program, and its JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..stats import median, quantile
from .packages import PROGRAMS

__all__ = ["RESULTS", "SCHEMA", "Deviation", "Report", "Row", "Spread", "newest", "spread"]

SCHEMA = 1  # raised whenever a field changes its meaning or goes
RESULTS = Path(__file__).parents[1] / "results" / "foreign"


@dataclass(frozen=True)
class Spread:
    """Median and quantiles."""

    median: float
    q20: float
    q80: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), quantile(values, 0.2), quantile(values, 0.8))


@dataclass(frozen=True)
class Deviation:
    """From stock's run, and what stock itself comes to on other instruction sets; relative, in the largest loss and in
    the norm of all tensors."""

    losses: float
    tensors: float
    losses_budget: float
    tensors_budget: float

    @property
    def within(self) -> bool:
        return self.losses <= self.losses_budget and self.tensors <= self.tensors_budget  # NaN fails


@dataclass(frozen=True)
class Row:
    """One program."""

    name: str
    distribution: str
    version: str
    what: str
    way: str  # "accelerate" | "patch"
    threads: int
    rounds: int
    calls: list[tuple[str, int]]  # of recurrent modules, the most frequent first
    ran: dict[str, int]  # calls of each backend
    deviation: Deviation
    stock: Spread  # CPU seconds of a run
    fastseq: Spread
    ratio: Spread  # stock's seconds over fastseq's, round by round


@dataclass(frozen=True)
class Report:
    """A run of `python -m benchmarks.foreign`."""

    environment: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def with_others_of(self, before: list[Row]) -> "Report":
        """With the rows of programs that this run left out, as they were measured before; in the order of PROGRAMS."""
        measured = {row.name: row for row in [*before, *self.rows]}
        return replace(self, rows=[measured[name] for name in PROGRAMS if name in measured])

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Raises ValueError for another schema."""
        d = json.loads(text)
        if d.get("schema") != SCHEMA:
            raise ValueError(f"schema {d.get('schema')} of the results; this version reads {SCHEMA}: run them again")
        return cls(d["environment"], [_row(r) for r in d["rows"]])


def _row(d: dict) -> Row:
    spreads = {name: Spread(**d[name]) for name in ("stock", "fastseq", "ratio")}
    calls = [(shape, count) for shape, count in d["calls"]]
    return Row(**(d | spreads | {"calls": calls, "deviation": Deviation(**d["deviation"])}))


def newest() -> Path:
    """The results that the docs show; FileNotFoundError if there are none."""
    files = sorted(RESULTS.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"no *.json in {RESULTS}: make foreign")
    return files[-1]

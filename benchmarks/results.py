"""Measurements as values, and their JSON."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from .cases import Case
from .ceilings import Ceiling
from .kinds import case_from_dict, case_to_dict

__all__ = ["SCHEMA", "Ratio", "Report", "Row", "Timing", "row_from_dict", "row_to_dict"]

SCHEMA = 1  # raised whenever a field changes its meaning or goes


@dataclass(frozen=True)
class Timing:
    """Of one contender: seconds per call, or bytes."""

    backend: str  # which implementation ran
    median: float
    q20: float
    q80: float
    samples: int
    note: str = ""
    first: float = 0.0  # seconds of the first call, compilations included; 0: not timed


@dataclass(frozen=True)
class Ratio:
    """The median of peer / ours over the rounds, and its 95 % interval."""

    ours: str
    peer: str
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One case with one number of threads."""

    set: str
    case: Case
    threads: int
    measure: str  # "time" | "memory"
    timings: dict[str, Timing]  # by contender
    ratios: tuple[Ratio, ...]
    calm: float | None  # the share of rounds that nobody disturbed; the others count only where this was too small

    @property
    def name(self) -> str:
        return f"{self.case} {self.threads}t"


@dataclass(frozen=True)
class Report:
    """A run."""

    environment: dict[str, str]
    ceilings: list[Ceiling]
    absent: dict[str, str]  # peer -> why this machine has it not
    rows: list[Row] = field(default_factory=list)
    import_s: Timing | None = None  # what fastseq adds to the import of torch
    schema: int = SCHEMA

    def to_json(self) -> str:
        rows = [row_to_dict(row) for row in self.rows]
        return json.dumps(asdict(self) | {"rows": rows}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Raises ValueError for another schema."""
        d = json.loads(text)
        if d.get("schema") != SCHEMA:
            raise ValueError(f"schema {d.get('schema')} of the results; this version reads {SCHEMA}: run them again")
        seconds = None if d["import_s"] is None else Timing(**d["import_s"])
        ceilings = [Ceiling(**c) for c in d["ceilings"]]
        return cls(d["environment"], ceilings, d["absent"], [row_from_dict(r) for r in d["rows"]], seconds)


def row_to_dict(row: Row) -> dict[str, Any]:
    """For JSON."""
    return asdict(row) | {"case": case_to_dict(row.case)}


def row_from_dict(d: dict[str, Any]) -> Row:
    """The inverse."""
    timings = {name: Timing(**t) for name, t in d["timings"].items()}
    case, ratios = case_from_dict(d["case"]), tuple(Ratio(**r) for r in d["ratios"])
    return Row(
        d["set"], case, d["threads"], d["measure"], timings, ratios, d.get("calm")
    )  # the first runs did not watch

"""Measurements as values, and their files: one JSON line for each, written as it is made and validated on load.

    {"schema": 2, "environment": {...}}      first, once
    {"ceiling": {...}}                       what the machine can do: ceilings.py
    {"row": {...}}                           one case
    {"recipe": {...}}                        one training, end to end
    {"import_s": {...}}, {"absent": {...}}   at the end

A row that was measured again stands twice, and the later one counts. Files of schema 1, one JSON object, are read too.
"""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from .cases import Case
from .ceilings import Ceiling, best_of
from .kinds import case_from_dict, case_to_dict
from .plain_data import read

__all__ = ["SCHEMA", "Journal", "Learner", "Ratio", "Recipe", "Report", "Row", "Timing", "row_from_dict", "row_to_dict"]

MEASURES = ("time", "cold", "memory")
SCHEMA = 2  # raised whenever a field changes its meaning or goes


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
    measure: str  # "time" | "cold": the caches emptied before each call | "memory"
    timings: dict[str, Timing]  # by contender
    ratios: tuple[Ratio, ...]
    calm: float | None = None  # the share of rounds that nobody disturbed
    mixed: bool = False  # these were too few, and the others count as well

    @property
    def name(self) -> str:
        return f"{self.case} {self.threads}t{'' if self.measure == 'time' else f' {self.measure}'}"

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from other rows, in this file and in others."""
        return self.set, str(self.case), str(self.threads), self.measure


@dataclass(frozen=True)
class Learner:
    """One side of a recipe's training."""

    library: str  # "fastseq" | "torch"
    tokens_per_s: float  # of target tokens, training steps only
    seconds_to_target: float | None  # of training; None: not reached
    steps_to_target: int | None
    losses: list[float]  # of the steps, in order
    quality: list[list[float]]  # [seconds of training, steps, the measured quality]


@dataclass(frozen=True)
class Recipe:
    """A training from end to end: the same data, seeds and steps, ours beside torch.nn."""

    name: str  # the recipe's, with its options
    seed: int
    threads: int
    target: str  # the fixed quality, in words
    level: float  # the same as a number
    learners: list[Learner]
    worst_loss: float  # the largest |ours - torch's| / torch's over the compared steps
    tolerance: float  # that it was held to


@dataclass(frozen=True)
class Report:
    """A run."""

    environment: dict[str, str]
    ceilings: list[Ceiling]
    absent: dict[str, str]  # peer -> why this machine has it not
    rows: list[Row] = field(default_factory=list)
    import_s: Timing | None = None  # what fastseq adds to the import of torch
    recipes: list[Recipe] = field(default_factory=list)
    schema: int = SCHEMA
    ended: bool = True  # not cut short

    def save(self, file: Path) -> None:
        with Journal(file, self.environment) as journal:
            for ceiling in self.ceilings:
                journal.ceiling(ceiling)
            for row in self.rows:
                journal.row(row)
            for recipe in self.recipes:
                journal.recipe(recipe)
            journal.end(self.absent, self.import_s)

    @classmethod
    def load(cls, file: Path) -> "Report":
        """Raises ValueError, naming file and line, for what is no result of a run or of another schema."""
        try:
            text = file.read_text()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: no text: {error}") from error
        if _is_first_schema(text):
            return _first_schema(text, file)
        found = cls({}, [], {}, ended=False)
        rows: dict[tuple[str, ...], Row] = {}
        lines = text.splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines) and number > 1:  # a run was killed while it wrote
                    break
                raise ValueError(f"{file}, line {number}: no JSON: {error}") from error
            try:
                found = found._with(record, number, rows)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
        if not lines:
            raise ValueError(f"{file}: empty; no run wrote it")
        return replace(found, ceilings=best_of(found.ceilings), rows=[*rows.values()])

    def _with(self, record: Any, number: int, rows: dict[tuple[str, ...], Row]) -> "Report":
        """One line more; rows go to `rows`."""
        if not isinstance(record, dict):
            raise ValueError("no record of a run")
        if number == 1:
            _need_schema(record.get("schema"))
            return replace(self, environment=read(dict[str, str], record.get("environment"), "environment"))
        (what, value), *rest = record.items() or [("", None)]
        if what == "row" and not rest:
            row = row_from_dict(value)
            rows[row.key] = row
        elif what == "ceiling" and not rest:
            self.ceilings.append(read(Ceiling, value, what))
        elif what == "recipe" and not rest:
            self.recipes.append(read(Recipe, value, what))
        elif what == "absent" and not rest:
            self.absent.update(read(dict[str, str], value, what))
            return replace(self, ended=True)
        elif what == "import_s" and not rest:
            return replace(self, import_s=read(Timing, value, what))
        else:
            raise ValueError(f"no record of a run: {sorted(record)}")
        return self


class Journal:
    """The file of a run that goes on: each record is on the disk before the next is measured. None: no file.

    goes_on: behind the last whole line of what is there.
    """

    def __init__(self, file: Path | None, environment: dict[str, str], goes_on: bool = False) -> None:
        self._file: IO[str] | None = None
        if file is not None:
            if goes_on:
                text = file.read_text()
                file.write_text(text[: text.rfind("\n") + 1])
            self._file = file.open("a" if goes_on else "w")
            if not goes_on:
                self._write({"schema": SCHEMA, "environment": environment})

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def ceiling(self, ceiling: Ceiling) -> None:
        self._write({"ceiling": asdict(ceiling)})

    def row(self, row: Row) -> None:
        self._write({"row": row_to_dict(row)})

    def recipe(self, recipe: Recipe) -> None:
        self._write({"recipe": asdict(recipe)})

    def end(self, absent: dict[str, str], import_s: Timing | None) -> None:
        if import_s is not None:
            self._write({"import_s": asdict(import_s)})
        self._write({"absent": absent})

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            print(json.dumps(record), file=self._file, flush=True)
            os.fsync(self._file.fileno())


def row_to_dict(row: Row) -> dict[str, Any]:
    """For JSON."""
    return asdict(row) | {"case": case_to_dict(row.case)}


def row_from_dict(d: Any) -> Row:
    """The inverse. Raises ValueError where a field is missing, unknown, of another type, or no value of it."""
    row = read(Row, d, "row", {Case: case_from_dict})
    if row.measure not in MEASURES:
        raise ValueError(f"row.measure: {row.measure!r}; expected {', '.join(MEASURES)}")
    return row


def _need_schema(schema: Any) -> None:
    if schema != SCHEMA:
        raise ValueError(f"schema {schema} of the results; this version reads 1 and {SCHEMA}: run them again")


def _is_first_schema(text: str) -> bool:
    """One object, indented."""
    return text.startswith("{\n")


def _first_schema(text: str, file: Path) -> Report:
    """Of a file of schema 1: its ceilings were of products alone."""
    try:
        d = json.loads(text)
        if d.get("schema") != 1:
            raise ValueError(f"schema {d.get('schema')} of the results; this version reads 1 and {SCHEMA}")
        ceilings = [Ceiling(c["dtype"], c["threads"], c["gflops"] * 1e9, c["by"]) for c in d["ceilings"]]
        rows = [row_from_dict(r) for r in d["rows"]]
        import_s = None if d["import_s"] is None else read(Timing, d["import_s"], "import_s")
        return Report(d["environment"], ceilings, d["absent"], rows, import_s)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error

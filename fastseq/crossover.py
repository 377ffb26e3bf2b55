"""Where which backend is faster, as data: `auto` takes the first rule that fits a call and whose backend can run it.

Bounds are half-open, [low, high). Each rule stands beside the measurement that chose it, or says that there was none.
Rules that `python -m benchmarks tune` measured are those of crossovers.json, hold on GPUs or CPUs of that name, and go
before the built-in ones. Under torch.compile a rule that bounds batch or steps is passed over: only what cannot change
between calls may decide there.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from .ops.cells import CELLS

__all__ = ["BUILT_IN", "DEFAULT", "FILE", "RULES", "Rule", "from_row", "measured", "to_row"]

MOST = 1 << 62
ANY = (0, MOST)
FILE = Path(__file__).parent / "crossovers.json"
BACKENDS = ("cpu", "triton", "cuda", "torch", "reference")


class Rule(NamedTuple):
    """`backend` for the calls within all bounds."""

    backend: str
    because: str  # the measurement, or "unmeasured" and the reason
    operator: str = "rnn"  # a key of dispatch.OPERATORS
    device: str | None = None  # "cpu" | "cuda"; None: any
    machine: str | None = None  # what was measured: torch's name of the GPU, or _cpus.cpu_name(); None: any
    cells: tuple[str, ...] = tuple(CELLS)  # of rnn
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    grad: bool | None = None  # gradients are recorded; None: either
    lengths: bool | None = None  # lengths or packed data; None: either
    packed: bool | None = None
    hidden: tuple[int, int] = ANY  # H; of attention A
    batch: tuple[int, int] = ANY  # B; of decoders and attention N
    steps: tuple[int, int] = ANY  # T; 1 for a cell
    threads: tuple[int, int] = ANY


CHOICES: dict[str, tuple[str, ...]] = {  # of a row's fields
    "backend": BACKENDS,
    "operator": ("rnn", "decoder", "attention"),
    "device": ("cpu", "cuda"),
    "cells": tuple(CELLS),
    "dtypes": Rule._field_defaults["dtypes"],
}
BOUNDS = ("hidden", "batch", "steps", "threads")


def measured(file: Path = FILE) -> tuple[Rule, ...]:
    """The rules that `python -m benchmarks tune` left; none without the file. Raises ValueError for a bad row."""
    if not file.exists():
        return ()
    try:
        rows = json.loads(file.read_text())
        if not isinstance(rows, list):
            raise ValueError("it is no list of rows")
        return tuple(_numbered(k, row) for k, row in enumerate(rows))
    except ValueError as error:
        raise ValueError(f"{file}: {error}; mend it, or delete it: python -m benchmarks tune writes it anew") from error


def from_row(row: Any) -> Rule:
    """One rule of the file: `Rule`'s fields, those left out as there; of a bound, null for no end."""
    if not isinstance(row, dict):
        raise ValueError(f"a row is {type(row).__name__}; expected an object of Rule's fields")
    unknown = row.keys() - set(Rule._fields)
    missing = {"backend", "because", "device", "machine", "operator"} - row.keys()
    if unknown or missing:
        raise ValueError(
            f"fields {sorted(unknown)} are unknown" if unknown else f"fields {sorted(missing)} are missing"
        )
    values: dict[str, Any] = {}
    for name, value in row.items():
        if name in CHOICES:
            values[name] = _chosen(name, value)
        elif name in BOUNDS:
            values[name] = _bound(name, value)
        elif name in ("because", "machine"):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name}={value!r}; expected text")
            values[name] = value
        elif value is None or isinstance(value, bool):
            values[name] = value
        else:
            raise ValueError(f"{name}={value!r}; expected true, false or null")
    return Rule(**values)


def to_row(rule: Rule) -> dict[str, Any]:
    """The inverse, without the fields that are as `Rule` has them."""
    row = {name: value for name, value in rule._asdict().items() if value != Rule._field_defaults.get(name)}
    row |= {name: list(row[name]) for name in ("cells", "dtypes") if name in row}
    row |= {name: [row[name][0], None if row[name][1] == MOST else row[name][1]] for name in BOUNDS if name in row}
    return {"operator": rule.operator, **row}


def _numbered(k: int, row: Any) -> Rule:
    try:
        return from_row(row)
    except ValueError as error:
        raise ValueError(f"row {k}: {error}") from error


def _chosen(name: str, value: Any) -> Any:
    several = name in ("cells", "dtypes")
    given = value if several else [value]
    if not isinstance(given, list) or not given or any(item not in CHOICES[name] for item in given):
        raise ValueError(f"{name}={value!r}; expected {'a list of ' if several else ''}{', '.join(CHOICES[name])}")
    return tuple(given) if several else value


def _bound(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{name}={value!r}; expected [low, high], high null for no end")
    low, high = value[0], MOST if value[1] is None else value[1]
    if type(low) is not int or type(high) is not int or not 0 <= low < high:
        raise ValueError(f"{name}={value!r}; expected whole numbers, low below high")
    return low, high


FLOAT64 = Rule("torch", "float64 is for checking: PyTorch's own operator, bit for bit", dtypes=("float64",))
BUILT_IN: tuple[Rule, ...] = (
    Rule(
        "triton", "unmeasured: rows with lengths; PyTorch packs them on the host, which waits for the GPU",
        device="cuda", lengths=True, packed=False,
    ),
    Rule(
        "torch", "unmeasured: layers and cells; cuDNN and PyTorch's own kernels until others were found faster here",
        device="cuda",
    ),
    Rule(
        "triton", "unmeasured: a decoder, which in PyTorch is a loop in Python", operator="decoder", device="cuda"
    ),
    Rule(
        "triton", "unmeasured: an attention, which in PyTorch stores every pair's units", operator="attention",
        device="cuda",
    ),
)  # fmt: skip
RULES = (FLOAT64, *measured(), *BUILT_IN)

# In this order where no rule fits. Measured by `python -m benchmarks run` on Zen 5 (1 and 2 threads, T=50, B 1 to 64,
# H 64 to 512): cpu took torch's time or less, within 3 %, at every shape; so too with both held to AVX2.
DEFAULT = BACKENDS

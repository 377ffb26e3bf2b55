"""Tile sizes by descent: from the table's row, one step of one size at a time, as long as that is faster."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..cases import Case, LayerCase
from ..decoder_cases import WIDTHS, AttentionCase, DecoderCase

__all__ = ["CLASSES", "UNTUNED", "Class", "base_of", "measure", "neighbours", "replaced", "search"]

Row = dict[str, Any]
Put = Callable[[Sequence[Row]], None]  # makes these rows the table
Seconds = Callable[[Case, Sequence[str]], dict[str, float]]
FASTER = 0.97  # of the time before: less is noise
ROUNDS = 6
MOST_WARPS, MOST_STAGES, MOST_BLOCK = 16, 4, 256
UNTUNED = (
    "rnn_norm_inputs",
    "rnn_norm_sequence_forward",
    "rnn_norm_sequence_backward",
    "rnn_norm_steps_forward",
    "rnn_norm_steps_backward",
)  # of layer normalisation: not worth minutes before `gpu-options` has said which of these layers is too slow
FIXED = {"rnn_sequence": ("units",)}  # by the kernel's beginning: blocks that hold all of a size


class Class(NamedTuple):
    """Calls that one row is chosen for, and the cases that stand for them: the sum of their times counts."""

    kernel: str
    bits: int
    hidden: tuple[int, int | None]  # [lowest, highest]
    cases: tuple[Case, ...]


def _classes() -> Iterator[Class]:
    """What the promised rows and the seen programs call; the largest size of a class stands for it."""
    for bits, dtype in ((16, "bfloat16"), (32, "float32")):
        for way, mode in (("forward", "forward"), ("backward", "train")):
            for low, high in ((1, 16), (17, 32), (33, 64), (65, 128)):
                case = LayerCase("lstm", mode, 64, 64, high, high, dtype=dtype, device="cuda")
                yield Class(f"rnn_sequence_{way}", bits, (low, high), (case,))
            for low, top, h in ((1, 256, 256), (257, 512, 512), (513, None, 1024)):
                case = LayerCase("lstm", mode, 64, 64, h, h, dtype=dtype, device="cuda")
                yield Class(f"rnn_steps_{way}", bits, (low, top), (case,))
            for low, top, h in ((1, 64, 64), (65, 256, 256), (257, None, 512)):
                case = LayerCase("lstm_cell", mode, 1, 64, h, h, dtype=dtype, hx=True, device="cuda")
                yield Class(f"rnn_cell_{way}", bits, (low, top), (case,))
        for low, top, h in ((1, 256, 256), (257, None, 512)):
            additive, one, dot = (
                AttentionCase(score, "train", 64, steps, 64, h, dtype, device="cuda")
                for score, steps in (("additive", 64), ("additive", 1), ("dot", 64))
            )
            yield Class("attention_additive", bits, (low, top), (additive, one))
            yield Class("attention_dot", bits, (low, top), (dot,))
            yield Class("attention_pairs", bits, (low, top), (additive,))
            yield Class("attention_context", bits, (low, top), (additive, dot))
            yield Class("attention_weights_backward", bits, (low, top), (additive, dot))
            decoders = tuple(
                DecoderCase(attention, "lstm", "train", 64, 64, 64, h, dtype, device="cuda") for attention in WIDTHS
            )
            yield Class("decoder_forward", bits, (low, top), decoders)
            yield Class("decoder_backward", bits, (low, top), decoders)


CLASSES: tuple[Class, ...] = tuple(_classes())


def base_of(rows: Sequence[Row], of: Class, device: Any) -> Row | None:
    """The row that the table has for this class on this device; None: no such kernel there."""
    from fastseq.kernels import configs

    size = of.hidden[0] if of.hidden[1] is None else of.hidden[1]
    table = configs.load(json.dumps(rows))
    fitting = (row for row, known in zip(rows, table, strict=True) if known.fits(of.kernel, of.bits, size, device))
    return next(fitting, None)


def neighbours(row: Row) -> Iterator[Row]:
    """Rows with one size twice or half as large, or one more or less stage."""
    held = next((names for start, names in FIXED.items() if row["kernel"].startswith(start)), ())
    for name, size in row["blocks"].items():
        for other in (size // 2, size * 2) if name not in held else ():
            if 1 <= other <= MOST_BLOCK:
                yield row | {"blocks": row["blocks"] | {name: other}}
    tile = math.prod(sorted(row["blocks"].values())[:2])  # a thread for each element at most: no two hold the same one
    for other in (row["warps"] // 2, row["warps"] * 2):
        if 1 <= other <= MOST_WARPS and (other < row["warps"] or 32 * other <= tile):
            yield row | {"warps": other}
    for other in (row["stages"] - 1, row["stages"] + 1):
        if 1 <= other <= MOST_STAGES:
            yield row | {"stages": other}


def search(base: Row, seconds: Callable[[Row], float], end: Callable[[], bool]) -> tuple[Row, float, float, int]:
    """The best row, its time, the time of `base`, and how many were tried. `seconds` may raise, but not for base."""
    first = best_s = seconds(base)
    best, tried = base, {_key(base)}
    for _ in range(ROUNDS):
        before = best
        for row in neighbours(before):
            if end():
                break
            if _key(row) in tried:
                continue
            tried.add(_key(row))
            try:
                took = seconds(row)
            except Exception:  # too much shared memory, or registers, or wrong: a tile that is not for this GPU
                continue
            if took < FASTER * best_s:
                best, best_s = row, took
        if best is before:
            break
    return best, best_s, first, len(tried)


def measure(
    rows: list[Row],
    device: Any,
    timer: Seconds,
    put: Put,
    where: str,
    seconds: float,
    classes: Sequence[Class] = CLASSES,
) -> list[Row]:
    """The table with what was measured before the row that it was measured against. `put` tries a table."""
    stop = time.monotonic() + seconds
    arch = f"sm{device.arch}" if device.backend == "cuda" else str(device.arch)
    for of in classes:
        base = base_of(rows, of, device)
        if base is None or time.monotonic() > stop:
            continue
        own = base | {"bits": [of.bits], "hidden": list(of.hidden), "devices": [arch]}

        def timed(row: Row, of: Class = of, table: list[Row] = rows) -> float:
            put([row, *table])
            return sum(timer(case, ("triton",))["triton"] for case in of.cases)

        try:
            best, took, first, tried = search(own, timed, lambda: time.monotonic() > stop)
        except Exception as error:  # the row itself does not run: its kernel's tests say why
            print(f"{of.kernel} {_names(of)}: left as it is: {type(error).__name__}: {error}")
            continue
        how = (
            f"{first / took:.2f} times as fast as {_sizes(own)}"
            if best != own
            else f"none of {tried - 1} others was faster"
        )
        best = best | {"because": f"{took * 1e3:.4g} ms, {how}; {_names(of)}; {where}"}
        print(f"{of.kernel} {_sizes(best)}: {best['because']}")
        rows = _with(rows, best, base)
    put(rows)
    return rows


def _with(rows: list[Row], new: Row, base: Row) -> list[Row]:
    """`new` before `base`, and in the place of one that was measured for the same calls earlier."""
    same = ("kernel", "bits", "hidden", "devices")
    at = rows.index(base)
    kept = [(k, row) for k, row in enumerate(rows) if any(row[name] != new[name] for name in same)]
    return [*(row for k, row in kept if k < at), new, *(row for k, row in kept if k >= at)]


def _names(of: Class) -> str:
    return " + ".join(map(str, of.cases))


def _sizes(row: Row) -> str:
    blocks = ", ".join(f"{name} {size}" for name, size in row["blocks"].items())
    return f"{blocks}, {row['warps']} warps, {row['stages']} stages"


def _key(row: Row) -> str:
    return json.dumps([row["blocks"], row["warps"], row["stages"]], sort_keys=True)


@contextmanager
def replaced() -> Iterator[Put]:
    """Within the block the function it gives makes rows the kernels' table; after it their own is back."""
    from fastseq.kernels import configs

    kept = configs.TABLE

    def put(rows: Sequence[Row]) -> None:
        configs.TABLE = configs.load(json.dumps(rows))
        configs.find.cache_clear()

    try:
        yield put
    finally:
        configs.TABLE = kept
        configs.find.cache_clear()

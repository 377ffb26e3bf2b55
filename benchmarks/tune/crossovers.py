"""Where our kernels are faster than PyTorch's own operators: a grid of layers and cells, and from it rules for `auto`.

A size that was not measured counts as the next larger one that was, if the next smaller one agrees: a rule names calls
between measured sizes that are all faster, and nothing beyond the largest.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from fastseq.crossover import MOST, Rule

from ..cases import Case, LayerCase
from .configs import Seconds

__all__ = ["BATCHES", "HIDDEN", "Kind", "case_of", "measure", "rules_of"]

HIDDEN, BATCHES = (64, 128, 256, 512), (1, 8, 64)
STEPS = {1: (1, 2), 128: (2, MOST)}  # measured, and the bounds it stands for
GAIN = 1.03  # as many times as fast, at least: less may be another day's loss
OURS = ("triton", "cuda")


class Kind(NamedTuple):
    """What a rule cannot lump together."""

    steps: int
    dtype: str
    grad: bool
    cell: str


KINDS = tuple(Kind(*k) for k in product(STEPS, ("bfloat16", "float32"), (True, False), ("lstm", "gru")))


def case_of(kind: Kind, hidden: int, batch: int) -> Case:
    """One step is a cell's; layers of one step go the same way."""
    op = f"{kind.cell}_cell" if kind.steps == 1 else kind.cell
    mode = "train" if kind.grad else "forward"
    return LayerCase(op, mode, kind.steps, batch, hidden, hidden, dtype=kind.dtype, hx=kind.steps == 1, device="cuda")


def measure(
    timer: Seconds, gpu: str, where: str, seconds: float, kinds: Sequence[Kind] = KINDS, ours: Sequence[str] = OURS
) -> list[Rule]:
    """Rules for `gpu`, of as many kinds as the time allows. Of several backends of ours a rule names the fastest."""
    stop, rules = time.monotonic() + seconds, list[Rule]()
    for kind in kinds:
        if time.monotonic() > stop:
            print(f"out of time: {kind} and what follows is not measured")
            break
        found = {(h, b): _ratios(timer, case_of(kind, h, b), ours) for h, b in product(HIDDEN, BATCHES)}
        for name in ours:
            best = {at: of[name] if of[name] == max(of.values()) else 0.0 for at, of in found.items()}
            rules += rules_of(kind, best, gpu, where, name)
    return rules


def _ratios(timer: Seconds, case: Case, ours: Sequence[str]) -> dict[str, float]:
    """torch's time over that of each; 0 for a kernel that refuses or fails, which is not faster."""
    try:
        took = timer(case, (*ours, "torch"))
    except Exception as error:
        if len(ours) > 1:  # the others may do
            return {name: _ratios(timer, case, (name,))[name] for name in ours}
        print(f"{case}: {ours[0]}: {type(error).__name__}: {error}")
        return {ours[0]: 0.0}
    ratios = {name: took["torch"] / took[name] for name in ours}
    print(f"{case}: torch over " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    return ratios


def rules_of(
    kind: Kind, ratios: dict[tuple[int, int], float], gpu: str, where: str, backend: str = "triton"
) -> Iterator[Rule]:
    """One rule for each run of neighbouring batches, equal runs of neighbouring sizes together."""
    bounds_h, bounds_b = _bounds(HIDDEN), _bounds(BATCHES)
    by_size = [_runs([_faster(ratios, i, j) for j in range(len(BATCHES))]) for i in range(len(HIDDEN))]
    done: set[tuple[int, tuple[int, int]]] = set()
    for i, runs in enumerate(by_size):
        for run in runs:
            if (i, run) in done:
                continue
            last = i
            while last + 1 < len(HIDDEN) and run in by_size[last + 1]:
                last += 1
            done |= {(k, run) for k in range(i, last + 1)}
            seen = [ratios[HIDDEN[k], BATCHES[j]] for k in range(i, last + 1) for j in range(run[0], run[1])]
            how = f"{min(seen):.2f} to {max(seen):.2f} times as fast as torch at {len(seen)} sizes, T={kind.steps}"
            yield Rule(
                backend, f"{how}; {where}", device="cuda", gpu=gpu, cells=(kind.cell,), dtypes=(kind.dtype,),
                grad=kind.grad, lengths=False, hidden=(bounds_h[i], bounds_h[last + 1]),
                batch=(bounds_b[run[0]], bounds_b[run[1]]), steps=STEPS[kind.steps],
            )  # fmt: skip


def _faster(ratios: dict[tuple[int, int], float], i: int, j: int) -> bool:
    """At a measured size and at the next smaller ones, of whose calls the rule would speak as well."""
    near = product({max(i - 1, 0), i}, {max(j - 1, 0), j})
    return all(ratios[HIDDEN[k], BATCHES[n]] >= GAIN for k, n in near)


def _bounds(sizes: Sequence[int]) -> list[int]:
    """Of the half-open intervals that end with each size."""
    return [1, *(size + 1 for size in sizes)]


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """[begin, end) of each run of True."""
    edges = [k for k in range(len(flags) + 1) if (k < len(flags) and flags[k]) != (k > 0 and flags[k - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))

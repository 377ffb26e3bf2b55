"""What this machine can do at most, measured beside the rows: no recurrence beats the best matrix product."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from fastseq import _native

__all__ = ["Ceiling", "best_of", "measure"]

SHAPES = ((1024, 1024, 1024), (2048, 1024, 512), (3200, 2048, 512))  # M, N, K of torch.mm
SECONDS = 0.3  # for each source; the best of its repetitions counts
TILE_CODE = {"float32": 0, "bfloat16": 1}  # of `tile_rate`
TILE_REPEATS = 50_000  # about 25 ms: threads that start one after the other still overlap


@dataclass(frozen=True)
class Ceiling:
    """The fastest source of matrix products."""

    dtype: str  # "float32" | "bfloat16"
    threads: int
    gflops: float
    by: str


def measure(dtype: str, threads: int) -> Ceiling:
    """torch.mm against the register tile of our own kernels, whichever is faster."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    rates = {f"torch.mm {m}x{n}x{k}": _best(_mm(kind, m, n, k)) for m, n, k in SHAPES}
    if _native.C is not None:
        tile = partial(_native.C.tile_rate, TILE_CODE[dtype], TILE_REPEATS)
        rates["the register tile"] = _best(lambda: _at_once(tile, threads))
    by = max(rates, key=rates.__getitem__)
    return Ceiling(dtype, threads, rates[by] * 1e-9, by)


def best_of(ceilings: Iterable[Ceiling]) -> list[Ceiling]:
    """One for each dtype and number of threads."""
    best: dict[tuple[str, int], Ceiling] = {}
    for c in ceilings:
        key = (c.dtype, c.threads)
        best[key] = max(best.get(key, c), c, key=lambda c: c.gflops)
    return list(best.values())


def _best(rate: Callable[[], float]) -> float:
    end, best = time.perf_counter() + SECONDS, 0.0
    while time.perf_counter() < end:
        best = max(best, rate())
    return best


def _mm(dtype: torch.dtype, m: int, n: int, k: int) -> Callable[[], float]:
    a, b, c = (torch.ones(shape, dtype=dtype) for shape in ((m, k), (k, n), (m, n)))

    def rate() -> float:
        begin = time.perf_counter()
        torch.mm(a, b, out=c)
        return 2 * m * n * k / (time.perf_counter() - begin)

    return rate


def _at_once(rate: Callable[[], float], threads: int) -> float:
    """The sum over threads that run at the same time: `rate` releases the GIL."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda _: rate(), range(threads)))

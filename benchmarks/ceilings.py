"""What this machine can do at most, measured beside the rows: no call beats the best matrix product, the loads of its
weights, or the waiting of its threads for each other. What a row is held to is roofline.py's.
"""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fastseq import _native

__all__ = ["MEMORY", "Ceiling", "best_of", "caches", "measure", "unit"]

SHAPES = ((1024, 1024, 1024), (2048, 1024, 512), (3200, 2048, 512))  # M, N, K of torch.mm
LARGE = (8192, 8192, 8192)  # on a GPU
SECONDS = 0.3  # for each source; the best of its repetitions counts
TILE_CODE = {"float32": 0, "bfloat16": 1}  # of `tile_rate`
TILE_REPEATS = 50_000  # about 25 ms: threads that start one after the other still overlap
MIB = 2**20
MEMORY = 1 << 62  # the size of the last level
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
USUAL = (32 * 2**10, MIB, 32 * MIB)  # where that does not tell
LARGEST = 512 * MIB  # of all threads' buffers, for the loads of memory
LOADED = 512 * MIB  # bytes for one rate of loads, so that a thread's start does not count
COPIED = {"cpu": 128 * MIB, "cuda": 1024 * MIB}
WAITS, CALLS = 20_000, 2_000


@dataclass(frozen=True)
class Ceiling:
    """The best that was seen: of a rate the most, of a latency the least.

    what: "float32", "bfloat16", ... of products, FLOP/s; "load" from a cache or memory that holds `size` bytes, and
    "copy", from memory to memory, bytes/s; "call" of the smallest operator of PyTorch, and "barrier" of all threads for
    each other, s.
    """

    what: str
    threads: int
    value: float
    by: str
    device: str = "cpu"
    size: int = 0  # bytes; of "load" alone


def unit(what: str) -> str:
    """Of a ceiling's value."""
    if what in ("call", "barrier"):
        return "s"
    return "B/s" if what in ("copy", "load") else "FLOP/s"


def caches() -> tuple[int, ...]:
    """Bytes of those for data that a core sees, smallest first."""
    try:
        kinds = [(index / "type").read_text().strip() for index in sorted(CACHES.glob("index*"))]
        sizes = [(index / "size").read_text().strip() for index in sorted(CACHES.glob("index*"))]
        found = [1024 * int(size[:-1]) for kind, size in zip(kinds, sizes, strict=True) if kind != "Instruction"]
    except (OSError, ValueError):
        return USUAL
    return tuple(sorted(found)) or USUAL


def measure(dtypes: Iterable[str], threads: int, device: str = "cpu") -> list[Ceiling]:
    """All of them, for so many threads; about three seconds."""
    torch.set_num_threads(threads)
    found = [products(dtype, threads, device) for dtype in dtypes]
    copy = _copy(threads, device)
    found += [copy, _call(threads, device)]
    if device == "cuda":
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        found += [replace(copy, what="load", size=size) for size in (l2, MEMORY)]  # loads from L2 cost nothing then
    elif _native.C is not None:
        found += [_load(size, threads) for size in (*caches(), MEMORY)]
        if 1 < threads <= (os.cpu_count() or 1):
            wait = min(_native.C.barrier_seconds(threads, WAITS) for _ in range(5))
            found.append(Ceiling("barrier", threads, wait, "the kernels' barrier"))
    return found


def products(dtype: str, threads: int, device: str = "cpu") -> Ceiling:
    """torch.mm against the register tile of our own kernels, whichever is faster."""
    kind = getattr(torch, dtype)
    shapes = SHAPES if device == "cpu" else (*SHAPES, LARGE)
    rates = {f"torch.mm {m}x{n}x{k}": _best(_mm(kind, m, n, k, device)) for m, n, k in shapes}
    if device == "cpu" and _native.C is not None and dtype in TILE_CODE:
        tile = partial(_native.C.tile_rate, TILE_CODE[dtype], TILE_REPEATS)
        rates["the register tile"] = _best(lambda: _at_once(tile, threads))
    by = max(rates, key=rates.__getitem__)
    return Ceiling(dtype, threads, rates[by], by, device)


def best_of(ceilings: Iterable[Ceiling]) -> list[Ceiling]:
    """One of each."""
    best: dict[tuple[object, ...], Ceiling] = {}
    for c in ceilings:
        key = c.what, c.threads, c.device, c.size
        known = best.setdefault(key, c)
        best[key] = c if (c.value < known.value) == (unit(c.what) == "s") else known
    return list(best.values())


def _load(size: int, threads: int) -> Ceiling:
    """Of buffers half as large: the other half is for what else there is. All threads share the largest cache."""
    shared = threads if size >= caches()[-1] else 1
    buffer = min(size // 2, LARGEST) // shared
    repeats = max(1, LOADED // buffer)
    by = f"vector loads, {threads} x {buffer:,} bytes"
    return Ceiling("load", threads, _best(lambda: _native.C.load_rate(buffer, repeats, threads)), by, size=size)  # type: ignore[union-attr]


def _copy(threads: int, device: str) -> Ceiling:
    """Bytes read and written."""
    source = torch.zeros(COPIED[device] // 4, device=device)
    target = torch.empty_like(source)
    rate = _rate(lambda: target.copy_(source), 2 * COPIED[device], device)
    return Ceiling("copy", threads, _best(rate), "torch.Tensor.copy_", device)


def _call(threads: int, device: str) -> Ceiling:
    """Of many in a row: on a GPU that is what a launch costs the host or the GPU, whichever is slower."""
    x = torch.zeros(1, device=device)

    def calls() -> None:
        for _ in range(CALLS):
            x.zero_()

    with torch.no_grad():
        return Ceiling("call", threads, 1 / _best(_rate(calls, CALLS, device)), "torch.Tensor.zero_", device)


def _best(rate: Callable[[], float]) -> float:
    rate()
    end, best = time.perf_counter() + SECONDS, rate()
    while time.perf_counter() < end:
        best = max(best, rate())
    return best


def _rate(run: Callable[[], object], amount: float, device: str) -> Callable[[], float]:
    """amount / s of a run."""

    def rate() -> float:
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return amount / (time.perf_counter() - begin)

    return rate


def _mm(dtype: torch.dtype, m: int, n: int, k: int, device: str) -> Callable[[], float]:
    a, b, c = (torch.ones(shape, dtype=dtype, device=device) for shape in ((m, k), (k, n), (m, n)))
    return _rate(lambda: torch.mm(a, b, out=c), 2 * m * n * k, device)


def _at_once(rate: Callable[[], float], threads: int) -> float:
    """The sum over threads that run at the same time: `rate` releases the GIL."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda _: rate(), range(threads)))

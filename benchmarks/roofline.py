"""How long a case takes at least on this machine, and for which reason (Williams, Waterman and Patterson 2009).

Three bounds, each a lower one, of which the largest counts:

    products  FLOPs / the best rate of matrix products
    loads     inputs, outputs and weights once, and in later steps what these read again: from each cache as much as it
              holds, smallest first; what fits the first may stay in registers
    waiting   a call of PyTorch's
"""

from collections.abc import Sequence
from typing import NamedTuple

from .cases import Case
from .ceilings import Ceiling

__all__ = ["Bound", "bound", "intensity"]


class Bound(NamedTuple):
    """The least time of a call."""

    seconds: float
    by: str  # "products" | "loads" | "waiting"


def bound(case: Case, threads: int, ceilings: Sequence[Ceiling], cold: bool = False) -> Bound | None:
    """None where no ceiling of products was measured for the case's dtype and threads."""
    known = [c for c in ceilings if (c.threads, c.device) == (threads, case.device)]
    dtype = "bfloat16" if case.dtype == "autocast" else case.dtype
    if not any(c.what == dtype for c in known):
        return None
    rate = max(c.value for c in known if c.what in (dtype, "float32"))  # a CPU without bf16 computes in fp32
    bounds = [Bound(case.flops / rate, "products")]
    bounds += [Bound(c.value, "waiting") for c in known if c.what == "call"]
    loads = sorted((c.size, c.value) for c in known if c.what == "load")
    if loads:
        traffic = case.forward_traffic
        warm = _seconds(traffic.once, loads, threads)
        first = traffic.once / loads[-1][1] if cold else warm
        again = traffic.again * _seconds(traffic.resident, loads, threads)
        bounds.append(Bound(first + again + (case.passes - 1) * (warm + again), "loads"))
    return max(bounds)


def intensity(case: Case) -> float:
    """FLOPs for each byte that must be moved."""
    traffic = case.forward_traffic
    return case.flops / (case.passes * (traffic.once + traffic.again * traffic.resident))


def _seconds(amount: float, loads: Sequence[tuple[int, float]], threads: int) -> float:
    """Of reading so many bytes once more, each thread its share. loads: size of a level, and its rate."""
    seconds, left = 0.0, amount
    for level, (size, rate) in enumerate(loads):
        part = min(left, float(size) * threads)
        left -= part
        seconds += part / rate if level or len(loads) == 1 else 0.0
    return seconds

"""How long a case takes at least on this machine, and for which reason (Williams, Waterman and Patterson 2009).

Three bounds, each a lower one, of which the largest counts:

    products  FLOPs / the best rate of matrix products
    loads     inputs, outputs and weights once, and in each later step what it reads again, from the smallest cache
              that holds it
    waiting   a call of PyTorch's, and for each step a barrier where there are threads to wait for
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .cases import Case
from .ceilings import MEMORY, Ceiling

__all__ = ["Bound", "bound", "intensity"]


class Bound(NamedTuple):
    """The least time of a call."""

    seconds: float
    by: str  # "products" | "loads" | "waiting"


def bound(case: Case, threads: int, ceilings: Sequence[Ceiling], cold: bool = False) -> Bound | None:
    """None where no ceiling of products was measured for the case's dtype and threads."""
    known = [c for c in ceilings if (c.threads, c.device) == (threads, case.device)]
    dtype = "bfloat16" if case.dtype == "autocast" else case.dtype
    rate = next((c.value for c in known if c.what == dtype), None)
    if rate is None:
        return None
    latency = {c.what: c.value for c in known if c.what in ("call", "barrier")}
    loads = sorted((c.size, c.value) for c in known if c.what == "load")
    traffic = case.forward_traffic
    waiting = latency.get("call", 0.0) + case.passes * traffic.steps * latency.get("barrier", 0.0)
    bounds = [Bound(case.flops / rate, "products"), Bound(waiting, "waiting")]
    if loads:
        seconds = _seconds(loads, threads)
        first = traffic.once / loads[-1][1] if cold else seconds(traffic.once)
        again = case.passes * traffic.steps - 1
        bounds.append(
            Bound(first + (case.passes - 1) * seconds(traffic.once) + again * seconds(traffic.resident), "loads")
        )
    return max(bounds)


def intensity(case: Case) -> float:
    """FLOPs for each byte that must be moved."""
    traffic = case.forward_traffic
    again = (case.passes * traffic.steps - 1) * traffic.resident
    return case.flops / (case.passes * traffic.once + again)


def _seconds(loads: Sequence[tuple[int, float]], threads: int) -> Callable[[int], float]:
    """Of reading so many bytes, each thread its share. What fits the first level may stay in registers: no time."""

    def seconds(amount: int) -> float:
        share = amount / threads
        level = next((k for k, (size, _) in enumerate(loads) if share <= size), len(loads) - 1)
        return 0.0 if level == 0 and loads[0][0] < MEMORY else amount / loads[level][1]

    return seconds

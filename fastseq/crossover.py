"""Where which backend is faster, as data: `auto` takes the first rule that fits a call and whose backend can run it.

Bounds are half-open, [low, high). Each rule stands beside the measurement that chose it. Under torch.compile a rule
that bounds batch or steps is passed over: only what cannot change between calls may decide there.
"""

from typing import NamedTuple

__all__ = ["DEFAULT", "RULES", "Rule"]

MOST = 1 << 62
ANY = (0, MOST)


class Rule(NamedTuple):
    """`backend` for the calls within all bounds."""

    backend: str
    because: str  # the measurement, or "unmeasured" and the reason
    cells: tuple[str, ...] = ("lstm", "gru", "gru_reset_before")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    grad: bool | None = None  # gradients are recorded; None: either
    lengths: bool | None = None  # lengths or packed data; None: either
    hidden: tuple[int, int] = ANY  # H
    batch: tuple[int, int] = ANY  # B
    steps: tuple[int, int] = ANY  # T; 1 for a cell
    threads: tuple[int, int] = ANY


RULES: tuple[Rule, ...] = (
    Rule("torch", "float64 is for checking: PyTorch's own operator, bit for bit", dtypes=("float64",)),
)

# In this order where no rule fits. Measured by `python -m benchmarks run` on Zen 5 (1 and 2 threads, T=50, B 1 to 64,
# H 64 to 512): cpu took torch's time or less, within 3 %, at every shape; so too with both held to AVX2.
DEFAULT = ("cpu", "torch", "reference")

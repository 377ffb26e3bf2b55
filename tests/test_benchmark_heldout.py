"""What a wrong choice of auto's costs, on times that are known."""

import pytest

from benchmarks import heldout, results
from benchmarks.cases import LayerCase
from benchmarks.registry import SETS
from benchmarks.tune.crossovers import BATCHES, HIDDEN

CASE = LayerCase("lstm", "train", 33, 3, 40, 96)


def a_row(auto: str, **others: float) -> results.Row:
    """Of 1 s on the backend of auto's choice; ratios are known to 1 %."""
    seconds = {auto: 1.0} | others
    timings = {name: results.Timing(name, s, s, s, 5) for name, s in seconds.items()}
    ratios = tuple(results.Ratio("auto", name, s, s * 0.99, s * 1.01) for name, s in seconds.items())
    return results.Row("heldout", CASE, 1, "time", timings | {"auto": timings[auto]}, ratios, 1.0)


def test_the_bound_is_of_the_best_backend() -> None:
    assert heldout.upper(a_row("cpu", torch=1.2, reference=5.0)) == (1.0, "cpu")
    bound, best = heldout.upper(a_row("cpu", torch=0.9, reference=0.95))
    assert (bound, best) == (pytest.approx(1 / (0.9 * 0.99)), "torch")


def test_the_worst_row_stands_beside_the_promise() -> None:
    def line(*rows: results.Row) -> list[str]:
        return list(heldout.heldout_table(results.Report({}, [], {}, list(rows))).lines[0])

    good, near, bad = a_row("cpu", torch=1.2), a_row("cpu", torch=0.99), a_row("cpu", torch=0.8)
    assert line(good, good) == ["cpu", "2", "0", "1.000", "", "1.05"]
    assert line(good, near) == ["cpu", "2", "1", "1.020", f"{CASE} 1t: torch", "1.05"]
    assert line(good, bad, near) == ["cpu", "3", "2", "1.263", f"{CASE} 1t: torch", "1.05 (missed by 1 rows)"]


def test_no_shape_is_of_the_grid_that_tune_measures() -> None:
    cases = [e.case for e in SETS["heldout"] if isinstance(e.case, LayerCase)]
    assert cases
    for case in cases:
        assert case.H not in HIDDEN
        assert (case.H, case.B) not in {(h, b) for h in HIDDEN for b in BATCHES}

"""Sweeps, their exponents and crossovers, on times that are known."""

import math

import pytest

from benchmarks import growth, results
from benchmarks.cases import LayerCase
from benchmarks.decoder_cases import DecoderCase
from benchmarks.registry import SETS

LAYER = LayerCase("lstm", "train", 50, 8, 128, 128)


def a_row(axis: str, case: object, ours: float, peer: float, spread: float = 0.0, threads: int = 1) -> results.Row:
    timings = {name: results.Timing(name, s, s, s, 5) for name, s in (("auto", ours), ("torch.nn", peer))}
    ratio = results.Ratio("auto", "torch.nn", peer / ours, peer / ours - spread, peer / ours + spread)
    return results.Row(f"growth-{axis}", case, threads, "time", timings, (ratio,), 1.0)  # type: ignore[arg-type]


def test_exponents_are_those_of_the_larger_sizes() -> None:
    sizes = (1, 2, 4, 8, 16, 32)
    assert growth.fit(sizes, [5 + 0.0 * n for n in sizes]).exponent == pytest.approx(0, abs=1e-12)
    assert growth.fit(sizes, [3e-6 * n**2 for n in sizes]) == pytest.approx((2, 0), abs=1e-7)
    bent = growth.fit(sizes, [max(4.0, n) for n in sizes])  # constant up to 4
    assert bent == pytest.approx((1, 0), abs=1e-7)
    rough = growth.fit((8, 16, 32), [1.0, 2.2, 4.0])
    assert rough.exponent == pytest.approx(1.0)
    residual = math.log(2.2) - (math.log(1.0) + math.log(2.2) + math.log(4.0)) / 3
    squares = residual**2 + 2 * (residual / 2) ** 2
    assert rough.error == pytest.approx(math.sqrt(squares / (2 * math.log(2) ** 2)))
    assert math.isnan(growth.fit((1, 2), [1.0, 4.0]).error)


def test_rows_that_differ_in_one_size_are_a_sweep() -> None:
    rows = [a_row("H", LayerCase("lstm", "train", 50, 8, h, h), h**2.0, h**3.0) for h in (256, 64, 128)]
    rows += [a_row("H", LayerCase("gru", "train", 50, 8, h, h), 1.0, 1.0) for h in (64, 128)]
    rows += [a_row("H", DecoderCase("luong", "lstm", "train", 20, 20, 1, 64), 1.0, 1.0)]  # alone
    rows += [a_row("threads", LAYER, 2.0 / n, 3.0, threads=n) for n in (2, 1)]
    found = growth.sweeps(rows)
    assert [(s.name, s.sizes) for s in found] == [
        ("lstm-train-T50-B8 by H", (64, 128, 256)), ("gru-train-T50-B8 by H", (64, 128)), (str(LAYER), (1, 2)),
    ]  # fmt: skip
    table = growth.growth_table(results.Report({}, [], {}, rows))
    assert list(table.lines[0][1:]) == [
        "64 128 256", "2.00 ± 0.00", "torch.nn", "3.00 ± 0.00", "64.00 128.00 256.00", "none: ours is faster",
    ]  # fmt: skip
    assert table.lines[2][2] == "-1.00"


def test_a_crossover_lies_where_both_are_sure() -> None:
    """Between neighbours whose intervals leave no doubt; one that is in doubt is passed over."""

    def found(spread: float, *peers: float) -> list[float]:
        cases = [LayerCase("lstm", "train", 50, 2**k, 128, 128) for k in range(len(peers))]
        rows = [a_row("B", case, 1.0, peer, spread) for case, peer in zip(cases, peers, strict=True)]
        return growth.crossovers(growth.sweeps(rows)[0], "auto", "torch.nn")

    assert found(0.0, 2.0, 0.5) == pytest.approx([math.sqrt(2)])
    assert found(0.0, 4.0, 2.0, 0.5, 0.25) == pytest.approx([2 * math.sqrt(2)])
    assert found(0.0, 0.5, 2.0, 0.5) == pytest.approx([math.sqrt(2), 2 * math.sqrt(2)])
    assert found(0.1, 2.0, 1.05, 0.5) == pytest.approx([2.0])  # the middle may be either
    assert found(0.0, 2.0, 1.5) == []
    assert found(0.6, 1.5, 0.5) == []


def test_every_size_is_swept() -> None:
    for name, axis in growth.AXES.items():
        rows = [results.Row(e.set, e.case, n, e.measure, {}, ()) for e in SETS[name] for n in e.threads or ()]
        found = growth.sweeps(rows)
        assert found
        assert all(s.axis == axis and len(s.sizes) >= (2 if axis == "threads" else 4) for s in found)
        assert sum(len(s.rows) for s in found) == len(rows)

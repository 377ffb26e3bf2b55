"""The registry as pytest-benchmark cases: `python -m pytest benchmarks -m quick`, or `-k "gru and B32"`.

`make test` does not collect them. Each is checked before it is timed, and grouped with its peers; on one thread. A case
gets a quarter of a second, at least three rounds: all take less than an hour, `quick` less than three minutes.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.equality import check, precision, truth_of
from benchmarks.kinds import draw
from benchmarks.peers import OPT_IN, PEERS
from benchmarks.problem import Problem
from benchmarks.programs import NotRunnable, Results
from benchmarks.registry import SETS

pytest.importorskip("pytest_benchmark")


def _cases() -> Iterator[Any]:
    """Each case with each contender that runs it as it is. Quick: those of the set `quick`, and one of each other."""
    quick = {e.case for e in SETS["quick"]} | {entries[0].case for name, entries in SETS.items() if entries}
    pairs = [(e.case, name) for e in SETS["full"] if e.measure == "time" for pair in e.pairs for name in pair]
    for case, name in dict.fromkeys(pairs):
        peer = PEERS[name]
        if name not in OPT_IN and peer.threads is None and peer.form(case) == case and peer.obstacle(case) is None:
            marks = [pytest.mark.quick] if case in quick else []
            yield pytest.param(case, name, id=f"{case}-{name}", marks=marks)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=1)  # contenders of a case follow one another
def _problem(case: Case) -> tuple[Problem, Results]:
    problem = draw(case)
    return problem, truth_of(problem)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.benchmark(max_time=0.25, min_rounds=3, disable_gc=True)
@pytest.mark.parametrize(("case", "name"), list(_cases()))
def test_registry(case: Case, name: str, benchmark: Any) -> None:
    reason = PEERS[name].unavailable() or case.unavailable()
    if reason is not None:
        pytest.skip(reason)
    problem, truth = _problem(case)
    try:
        program = PEERS[name].build(problem)
    except NotRunnable as reason:
        pytest.skip(str(reason))
    check(program, truth, precision(case))
    benchmark.group = str(case)
    benchmark.extra_info["backend"] = program.backend
    with torch.set_grad_enabled(program.grad):
        benchmark(program.step)

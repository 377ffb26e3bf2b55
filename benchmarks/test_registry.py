"""The registry as pytest-benchmark cases: `python -m pytest benchmarks -k "gru and B32"`.

`make test` does not collect them. Each is checked before it is timed, and grouped with its peers; on one thread.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.equality import check, truth_of
from benchmarks.kinds import draw
from benchmarks.peers import OPT_IN, PEERS
from benchmarks.programs import NotRunnable
from benchmarks.registry import SETS

pytest.importorskip("pytest_benchmark")


def _cases() -> Iterator[Any]:
    """Each case of the registry with each contender that runs it as it is."""
    pairs = [(e.case, name) for e in SETS["full"] if e.measure == "time" for pair in e.pairs for name in pair]
    for case, name in dict.fromkeys(pairs):
        peer = PEERS[name]
        if name not in OPT_IN and peer.threads is None and peer.form(case) == case and peer.obstacle(case) is None:
            yield pytest.param(case, name, id=f"{case}-{name}")


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize(("case", "name"), list(_cases()))
def test_registry(case: Case, name: str, benchmark: Any) -> None:
    reason = PEERS[name].unavailable() or case.unavailable()
    if reason is not None:
        pytest.skip(reason)
    problem = draw(case)
    try:
        program = PEERS[name].build(problem)
    except NotRunnable as reason:
        pytest.skip(str(reason))
    check(program, truth_of(problem), case.dtype)
    benchmark.group = str(case)
    benchmark.extra_info["backend"] = program.backend
    with torch.set_grad_enabled(program.grad):
        benchmark(program.step)

"""Kernels among other threads: nested, oversubscribed, concurrent, and after a fork."""

import ctypes
import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastseq
from fastseq import _native
from tests.oracle import CELLS, Case, Problem, Results, check_layer, run

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

from fastseq.ops.rnn import rnn_layer

CASE = Case("lstm", T=12, B=40, I=30, H=70, bidirectional=True, rows="lengths", threads=2)


def single(problem: Problem) -> Results:
    """The results of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = run(rnn_layer, problem)
    torch.set_num_threads(threads)
    return results


def assert_same_bits(got: Results, expected: Results) -> None:
    for name, t in expected.items():
        assert torch.equal(got[name], t), name


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("threads", [3, 8, 70])
@pytest.mark.parametrize("shape", [(20, 40, 30, 70), (20, 2, 8, 260)], ids=["split_by_rows", "split_by_units"])
def test_more_threads_than_cores(cell: str, threads: int, shape: tuple[int, int, int, int]) -> None:
    """Waiting threads yield; a team larger than there is work, or than the kernels' limit of 64, still covers all."""
    check_layer(rnn_layer, Problem.draw(Case(cell, torch.float32, *shape, bidirectional=True, threads=threads)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds libgomp in /proc")
def test_nested_in_another_parallel_region() -> None:
    """Within somebody's OpenMP region a kernel stays on its thread: the team it asks for would not come."""
    maps = Path("/proc/self/maps").read_text().split()
    libgomp = ctypes.CDLL(next(word for word in maps if Path(word).name.startswith("libgomp")))
    problems = [Problem.draw(CASE, seed) for seed in range(2)]
    expected = [single(p) for p in problems]
    found: dict[int, Results] = {}

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_: Any) -> None:
        rank = libgomp.omp_get_thread_num()
        torch.set_num_threads(2)
        found[rank] = run(rnn_layer, problems[rank])

    libgomp.GOMP_parallel(region, None, ctypes.c_uint(2), ctypes.c_uint(0))
    assert sorted(found) == [0, 1]
    for rank, results in found.items():
        assert_same_bits(results, expected[rank])


def test_called_from_several_python_threads() -> None:
    """The interpreter lock is released inside kernels: calls overlap and share nothing."""
    problems = [Problem.draw(CASE, seed) for seed in range(4)]
    torch.set_num_threads(2)
    expected = [run(rnn_layer, p) for p in problems]

    def work(k: int) -> Results:
        torch.set_num_threads(2)
        return run(rnn_layer, problems[k % 4])

    with ThreadPoolExecutor(4) as pool:
        for k, results in enumerate(pool.map(work, range(24))):
            assert_same_bits(results, expected[k % 4])


def in_child(problem: Problem, channel: Any) -> None:
    torch.set_num_threads(2)  # asked for, but the pool's threads stayed in the parent
    channel.send({n: t.numpy() for n, t in run(rnn_layer, problem).items()})


@pytest.mark.skipif(not hasattr(multiprocessing, "get_context") or sys.platform == "win32", reason="no fork")
def test_forked_child() -> None:
    """After a fork the thread pool is gone: a child that waited for it would hang."""
    problem = Problem.draw(replace(CASE, rows="full"))  # to clear padding, torch itself would wait for the pool
    expected = single(problem)
    torch.set_num_threads(2)
    run(rnn_layer, problem)  # so that the pool exists
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=in_child, args=(problem, theirs))
    child.start()
    try:
        assert ours.poll(60), "the child hangs"
        assert_same_bits({n: torch.from_numpy(a) for n, a in ours.recv().items()}, expected)
    finally:
        child.kill()
        child.join()


class Encoded(Dataset[Tensor]):
    """Items that are made by a model, as feature-extracting data sets do."""

    def __init__(self, module: torch.nn.Module, xs: Tensor) -> None:
        self.module, self.xs = module, xs

    def __len__(self) -> int:
        return len(self.xs)

    def __getitem__(self, k: int) -> Tensor:
        with torch.no_grad():
            return self.module(self.xs[k])[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader_worker(workers: int) -> None:
    """A model inside a DataLoader's worker process gives what it gives outside."""
    module, xs = fastseq.GRU(5, 33, bidirectional=True, backend="cpu"), torch.randn(4, 7, 3, 5)
    torch.set_num_threads(2)
    module(xs[0])
    torch.set_num_threads(1)
    expected = module(xs.transpose(0, 1).flatten(1, 2))[0].unflatten(1, (4, 3)).transpose(0, 1)
    torch.set_num_threads(2)
    loaded = torch.stack(
        [batch[0] for batch in DataLoader(Encoded(module, xs), num_workers=workers, timeout=60 * workers)]
    )
    assert torch.equal(loaded, expected.detach())

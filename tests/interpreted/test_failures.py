"""A memory that is full in the middle of a call: torch's error reaches the caller, and nothing is left half done."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fastseq.kernels import launch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastseq
from tests.kinds import KINDS, Kind, Sizes
from tests.pretended import InBackwardToo
from tests.seq2seq_models import model

SMALL = Sizes(T=2, B=2, S=3, I=3, H=4, D=5, most=17)


class Full(InBackwardToo):
    """Within the block the n-th new tensor finds no memory; None: they are only counted."""

    def __init__(self, n: int | None = None) -> None:
        super().__init__()
        self.n, self.made = n, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, given = function(*args, **(kwargs or {})), _storages((args, kwargs))
        new = sum(address not in given for address in _storages(found))
        if self.n is not None and self.made <= self.n < self.made + new:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        self.made += new
        return found


def _storages(tree: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tree_leaves(tree) if isinstance(t, Tensor) and t.numel()}


def raises_full(n: int) -> Any:
    return pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"), Full(n)


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), index


@pytest.fixture(autouse=True)
def everything_as_it_was() -> Any:
    def settings() -> tuple[Any, ...]:
        return (
            launch._recorded.get(), torch.is_grad_enabled(), torch._C._is_any_autocast_enabled(),
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
        )  # fmt: skip

    before = settings()
    yield
    assert settings() == before


@pytest.mark.parametrize("name", KINDS)
def test_in_forward(name: str) -> None:
    """At each of a call's tensors in turn; every next call, and its gradients, keep their bits."""
    kind = Kind.of(name, SMALL)
    expected = kind.step()
    with Full() as counted:
        kind.results()
    assert counted.made > 1
    for n in range(counted.made):
        error, full = raises_full(n)
        with error, full:
            kind.results()
        assert all(t.grad is None for t in kind.leaves)
    same(kind.step(), expected)
    assert kind.module.training


@pytest.mark.parametrize("name", KINDS)
def test_in_backward(name: str) -> None:
    """What forward saved is as it was: the same graph, asked again, gives all gradients to the bit."""
    kind = Kind.of(name, SMALL)
    expected = kind.step()
    torch.manual_seed(7)
    results = kind.results()
    grads = [t.detach().cos() for t in results]
    with Full() as counted:
        torch.autograd.backward(results, grads, retain_graph=True)
    assert counted.made > 1
    for n in range(counted.made):
        kind.forget()
        error, full = raises_full(n)
        with error, full:
            torch.autograd.backward(results, grads, retain_graph=True)
    kind.forget()
    torch.autograd.backward(results, grads)
    found = [torch.zeros_like(t) if t.grad is None else t.grad for t in kind.leaves]
    same([*results, *found], expected)
    kind.forget()
    same(kind.step(), expected)


def test_in_a_search() -> None:
    of = model("luong")
    of.decoder.backend = "triton"
    source = torch.arange(2)[:, None]

    def search() -> fastseq.GenerateOutput:
        return of.generate(source, max_new_tokens=2, return_weights=True)

    expected = search()
    with Full() as counted:
        search()
    for n in range(counted.made):
        error, full = raises_full(n)
        with error, full:
            search()
    found = search()
    for name in ("sequences", "lengths", "scores", "weights"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name

"""What a decoder's backward writes over and gives back, and what it must leave alone."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import _native
from tests.decoder_oracle import Case
from tests.test_decoder_plan import arguments, loops

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

from fastseq.ops import decoder as ops


@pytest.fixture
def consumed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each backward pass wrote over what forward had kept."""
    seen: list[bool] = []
    run_backward = ops.run_backward

    def noting(*args: Any) -> Any:
        seen.append(args[-1])
        return run_backward(*args)

    monkeypatch.setattr(ops, "_NATIVE", ops.Kernels(ops._NATIVE.forward, noting))
    return seen


def differentiated(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """All results of a loop, and what they are differentiated with respect to."""
    loop, x = arguments(case)
    masks = [id(t) for t in (x.mask, x.layer_masks, x.read_mask, x.out_mask)]
    flat = [t if t is None or id(t) in masks else t.detach().requires_grad_() for t in x.flat()]
    results = ops.decoder_loop(loop, ops.LoopTensors.of(loop, flat), True)
    shown = [t for t in (*results[:4], *results.h_n, *results.c_n) if t is not None]
    return shown, [t for t in flat if t is not None and t.requires_grad]


def gradients(of: list[Tensor], inputs: list[Tensor], retain_graph: bool) -> tuple[Tensor | None, ...]:
    sent = [torch.linspace(-1, 1, t.numel()).view_as(t).to(t.dtype) for t in of]
    return torch.autograd.grad(of, inputs, sent, retain_graph=retain_graph, allow_unused=True)


def assert_same_bits(a: tuple[Tensor | None, ...], b: tuple[Tensor | None, ...]) -> None:
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


@loops
def test_backward_leaves_a_retained_graph_as_it_is(case: Case, consumed: list[bool]) -> None:
    """Only the last pass may write over what forward kept, and it finds the same bits."""
    shown, inputs = differentiated(case)
    values = [t.detach().clone() for t in shown]
    passes = [gradients(shown, inputs, retain) for retain in (True, True, False)]
    assert consumed[:2] == [False, False]
    assert consumed[2] == (getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None) is not None)
    for again in passes[1:]:
        assert_same_bits(passes[0], again)
    assert_same_bits(tuple(values), tuple(shown))  # a later pass may not reach what the caller holds
    with pytest.raises(RuntimeError, match="second time"):
        gradients(shown, inputs, False)


@loops
def test_backward_leaves_what_hooks_have_packed(case: Case, consumed: list[bool]) -> None:
    packed: list[tuple[Tensor, Tensor]] = []

    def pack(t: Tensor) -> Tensor:
        packed.append((t, t.detach().clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        shown, inputs = differentiated(case)
    hooked = gradients(shown, inputs, False)
    assert consumed == [False]
    assert packed
    assert all(torch.equal(t, before) for t, before in packed)
    assert_same_bits(gradients(*differentiated(case), False), hooked)


def test_discarded_pages_are_fresh() -> None:
    """Large buffers read as zeros afterwards but for the pages that others share; small ones stay."""
    large, small = torch.ones(3 << 18), torch.ones(1 << 10)
    for t in (large, small):
        assert _native.C is not None
        _native.C.discard(t.data_ptr(), t.nbytes)
    assert small.sum() == small.numel()
    if sys.platform == "linux":
        assert large[1 << 15 : -(1 << 15)].sum() == 0
    assert large.fill_(2).sum() == 2 * large.numel()

"""resets=: a layer over several segments gives what it gives for each of them alone, on every backend."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import fastseq
from fastseq import functional as F
from tests.conftest import needs_native
from tests.oracle import EPS, largest
from tests.twins import BACKENDS, H, I, flatten

T, B = 9, 5
LENGTHS = [9, 4, 0, 7, 1]
ABLE = [name for name in BACKENDS if name != "torch"]  # which refuses them
backends = pytest.mark.parametrize("backend", ABLE)
kinds = pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])


def draw(module: Any, steps: int = T) -> tuple[Tensor, Any, Tensor]:
    """Input, states and resets for a module; among them those of the first step, of every step, and of none."""
    lead = (B, steps) if module.batch_first else (steps, B)
    resets = torch.rand(B, steps) < 0.3
    resets[0, 0] = resets[1] = True
    resets[3] = False
    states = [torch.randn(module.num_layers * (1 + module.bidirectional), B, H) for _ in "hc"]
    hx = tuple(states) if isinstance(module, nn.LSTM) else states[0]
    return torch.randn(*lead, I), hx, resets if module.batch_first else resets.mT


def alone(module: Any, x: Tensor, hx: Any, resets: Tensor, lengths: list[int]) -> list[Tensor]:
    """Each segment of each row as a call of its own; of one layer, time first: output and states."""
    dirs, outputs = 1 + module.bidirectional, []
    finals: list[list[Tensor]] = [[] for _ in flatten(hx)]
    for b, length in enumerate(lengths):
        given = [s[:, b] for s in flatten(hx)]
        cuts = sorted({0, *resets[:length, b].nonzero().flatten().tolist(), length})
        out, last = x.new_zeros(T, dirs * H), given
        for begin, end in pairwise(cuts):
            state = [torch.zeros_like(s) for s in given]
            for new, old in zip(state, given, strict=True):
                if begin == 0 and not resets[0, b]:
                    new[0] = old[0]
                if end == length:
                    new[1:] = old[1:]
            found, h_n = module(x[begin:end, b], tuple(state) if len(state) == 2 else state[0])
            out = torch.cat((out[:begin], found, out[end:]))
            ends = flatten(h_n)
            last = [torch.cat((e[:1], (e if begin == 0 else old)[1:])) for e, old in zip(ends, last, strict=True)]
        outputs.append(out)
        for of, s in zip(finals, last, strict=True):
            of.append(s)
    return [torch.stack(outputs, 1), *(torch.stack(of, 1) for of in finals)]


def close(got: list[Tensor], expected: list[Tensor], units: int = 64) -> None:
    """Within so many units in the last place of each tensor's largest value: other tiles, other orders of sums."""
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= units * EPS * max(1.0, largest(b))


def gradients(outputs: list[Tensor], module: Any, x: Tensor, hx: Any) -> list[Tensor]:
    loss = sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in outputs)
    return list(torch.autograd.grad(loss, [x, *flatten(hx), *module.parameters()]))


@backends
@kinds
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_segments_are_as_if_alone(kind: str, two: bool, lengths: list[int] | None, backend: str) -> None:
    """Forward and every gradient; a reset behind a row's length does nothing, and hx enters as the docs say."""
    module = getattr(fastseq, kind)(I, H, bidirectional=two, backend=backend)
    x, hx, resets = draw(module)
    for t in (x, *flatten(hx)):
        t.requires_grad_()
    got = flatten(module(x, hx, lengths=lengths, resets=resets))
    expected = alone(module, x, hx, resets, lengths or [T] * B)
    close(got, expected)
    close(gradients(got, module, x, hx), gradients(expected, module, x, hx))


@backends
@kinds
@pytest.mark.parametrize("options", [{"num_layers": 3, "batch_first": True}, {"num_layers": 2, "bidirectional": True}])
def test_every_layer_of_a_stack_resets(kind: str, options: dict[str, Any], backend: str) -> None:
    """As the layers one by one; in either layout."""
    module = getattr(fastseq, kind)(I, H, backend=backend, **options)
    x, hx, resets = draw(module)
    below, dirs, flat = x, 1 + module.bidirectional, list(module.parameters())
    per = len(flat) // module.num_layers
    for k in range(module.num_layers):
        state = [s[k * dirs : (k + 1) * dirs] for s in flatten(hx)]
        function, hx_k = getattr(F, kind.lower()), tuple(state) if kind == "LSTM" else state[0]
        below, _ = function(
            below, hx_k, flat[k * per : (k + 1) * per], lengths=LENGTHS, resets=resets, bidirectional=dirs == 2,
            batch_first=module.batch_first, backend=backend,
        )  # fmt: skip
    assert torch.equal(module(x, hx, lengths=LENGTHS, resets=resets)[0], below)


@backends
@kinds
@pytest.mark.parametrize("layers", [1, 2])
def test_steps_equal_the_whole(kind: str, layers: int, backend: str) -> None:
    """An agent acts one step at a time and learns from all of them at once, episodes ending in between."""
    module = getattr(fastseq, kind)(I, H, layers, backend=backend)
    x, hx, resets = draw(module)
    for t in (x, *flatten(hx)):
        t.requires_grad_()
    outputs, state = [], hx
    for t in range(T):
        out, state = module(x[t : t + 1], state, resets=resets[t : t + 1])
        outputs.append(out)
    steps, whole = [torch.cat(outputs), *flatten(state)], flatten(module(x, hx, resets=resets))
    close(steps, whole)
    d_steps, d_whole = (gradients(results, module, x, hx) for results in (steps, whole))
    close(d_steps, d_whole)
    for d in d_whole[1 : len(whole)]:  # of the initial states
        assert not d[:, resets[0]].any()
        assert d[:, ~resets[0]].any()


@backends
@kinds
def test_none_at_all_changes_no_bit(kind: str, backend: str) -> None:
    module = getattr(fastseq, kind)(I, H, 2, bidirectional=True, backend=backend)
    x, hx, resets = draw(module)
    for a, b in zip(flatten(module(x, hx, resets=torch.zeros_like(resets))), flatten(module(x, hx)), strict=True):
        assert torch.equal(a, b)


@backends
@kinds
def test_unbatched(kind: str, backend: str) -> None:
    """[T] beside [T, I]."""
    for batch_first in (False, True):
        module = getattr(fastseq, kind)(I, H, bidirectional=True, batch_first=batch_first, backend=backend)
        x, resets = torch.randn(T, I), torch.rand(T) < 0.4
        row = 0 if batch_first else 1
        batch = module(x.unsqueeze(row), resets=resets.unsqueeze(row))[0].squeeze(row)
        assert torch.equal(module(x, resets=resets)[0], batch)


@backends
@kinds
def test_nothing_passes_a_reset(kind: str, backend: str) -> None:
    """NaN and infinity stay in their segment, in outputs and input gradients."""
    module = getattr(fastseq, kind)(I, H, bidirectional=True, backend=backend)
    x, resets = torch.randn(6, 2, I), torch.zeros(6, 2, dtype=torch.bool)
    resets[2] = resets[4] = True
    for bad in (torch.nan, torch.inf):
        spoilt = x.clone()
        spoilt[2, 0] = bad
        spoilt.requires_grad_()
        out = module(spoilt, resets=resets)[0]
        (d_x,) = torch.autograd.grad(out[[0, 1, 4, 5]].sum(), spoilt)
        assert torch.equal(out[[0, 1, 4, 5]], module(x, resets=resets)[0][[0, 1, 4, 5]])
        assert d_x[[0, 1, 4, 5]].isfinite().all()
        assert not out[2:4, 0].isfinite().all() or bad == torch.inf
    hx = [torch.full((2, 2, H), torch.nan) for _ in "hc"]
    resets[0] = True
    out = module(x, tuple(hx) if kind == "LSTM" else hx[0], resets=resets)[0]
    assert out[:4].isfinite().all()  # forward it is not used, in reverse it enters at the end
    assert out[4:, :, :H].isfinite().all()


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh"])
def test_numeric_derivatives(cell: str) -> None:
    """First and second of the reference, by finite differences, with lengths, both directions and a projection."""
    lstm, hidden = cell == "lstm", 3
    stock = nn.LSTM(2, hidden, bidirectional=True, proj_size=2) if lstm else nn.GRU(2, hidden, bidirectional=True)
    weights = [p.detach().double().requires_grad_() for p in stock.parameters()]
    x = torch.randn(4, 3, 2).double().requires_grad_()
    resets = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]).bool()
    sizes = (2, hidden) if lstm else (hidden,)
    state = [torch.randn(2, 3, size).double().requires_grad_() for size in sizes]

    def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx, w = rest[: len(state)], rest[len(state) :]
        options = {"lengths": [4, 3, 2], "resets": resets, "bidirectional": True, "backend": "reference"}
        if lstm:
            return tuple(flatten(F.lstm(x, hx, w, **options)))
        return tuple(flatten(F.gru(x, hx[0], w, reset_after=cell == "gru", **options)))

    assert torch.autograd.gradcheck(call, (x, *state, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *state, *weights), fast_mode=True)


@backends
@kinds
def test_transforms(kind: str, backend: str) -> None:
    """vmap over rows with resets of their own, grad, and forward mode."""
    module = getattr(fastseq, kind)(I, H, bidirectional=True, backend=backend)
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.3
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def loss(given: dict[str, Tensor], x: Tensor, resets: Tensor) -> Tensor:
        row = {"resets": resets[:, None]}
        return flatten(torch.func.functional_call(module, given, x[:, None], row))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 1, 1))(parameters, x, resets)
    module(x, resets=resets)[0].square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad)
    tangent = torch.randn(T, I)
    _, along = torch.func.jvp(lambda x: loss(parameters, x, resets[:, 0]), (x[:, 0],), (tangent,))
    d_x = torch.func.grad(loss, argnums=1)(parameters, x[:, 0], resets[:, 0])
    torch.testing.assert_close(along, (d_x * tangent).sum(), rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(kind: str, dynamic: bool) -> None:
    """One graph; where the segments begin is no part of it. Outputs and gradients are eager's."""
    torch.compiler.reset()
    module = getattr(fastseq, kind)(I, H, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seed in range(2):
        torch.manual_seed(seed)
        x, hx, resets = draw(module)
        for t in (x, *flatten(hx)):
            t.requires_grad_()
        got, expected = (flatten(m(x, hx, lengths=torch.tensor(LENGTHS), resets=resets)) for m in (compiled, module))
        close(got, expected, 2)
        close(gradients(got, module, x, hx), gradients(expected, module, x, hx), 8)
    module = getattr(fastseq, kind)(I, H)
    compiled, (x, hx, resets) = torch.compile(module, fullgraph=True, backend="aot_eager"), draw(module, 1)
    close(flatten(compiled(x, hx, resets=resets)), flatten(module(x, hx, resets=resets)), 2)
    torch.compiler.reset()


@needs_native
def test_auto_goes_past_torch() -> None:
    """Which would run float64 and projections, but has no resets."""
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.3
    for module, given, chosen in (
        (fastseq.LSTM(I, H), x, "cpu"),
        (fastseq.GRU(I, H, dtype=torch.bfloat16), x.bfloat16(), "cpu"),
        (fastseq.LSTM(I, H, dtype=torch.float64), x.double(), "reference"),
        (fastseq.LSTM(I, H, proj_size=3), x, "reference"),
    ):
        told = fastseq.explain(module, given, resets=resets)
        assert told.chosen == chosen
        assert {v.backend: v.reason for v in told}["torch"] == "torch's operators have no resets within a sequence"
        assert module(given, resets=resets)[0].dtype == given.dtype
        assert module(given)[0].dtype == given.dtype  # a plan without resets is another one
    weights = list(nn.GRU(I, H).parameters())
    whole, _ = F.gru(x, None, weights, resets=resets, reset_after=False)
    assert torch.equal(whole, F.gru(x, None, weights, resets=resets, reset_after=False, backend="reference")[0])


@kinds
def test_autocast(kind: str) -> None:
    """The resets come through its casts: the bits of a call whose casts are made by hand."""
    module = getattr(fastseq, kind)(I, H)
    x, hx, resets = draw(module)
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = module(x, hx, resets=resets)[0], module(x, hx)[0]
    halves = tree_map(lambda t: t.bfloat16(), hx)
    by_hand = copy.deepcopy(module).bfloat16()(x.bfloat16(), halves, resets=resets)[0]
    assert torch.equal(got, by_hand.to(got.dtype))
    assert not torch.equal(got, plain)

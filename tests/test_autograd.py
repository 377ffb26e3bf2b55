"""Gradients beyond a plain backward: second derivatives, transforms, forward mode, the operators' contracts."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq import _native
from tests.oracle import CELLS, GATES, Case, Problem, check_second

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

from fastseq.backends import reference
from fastseq.ops import rnn as ops
from fastseq.ops.extras import NONE
from fastseq.ops.rnn import rnn_layer

ROWS = ("full", "lengths", "packed")
SMALL = [
    Case(cell, T=3, B=3, I=2, H=9, rows=rows, bidirectional=two, resets=resets)
    for cell, rows, two, resets in itertools.product(CELLS, ROWS, (False, True), (False, True))
    if not (resets and rows == "packed")
]
small_case = pytest.mark.parametrize("case", SMALL, ids=str)


@small_case
@pytest.mark.parametrize("layer", [rnn_layer, reference.layer], ids=["cpu", "reference"])
def test_second_derivatives(case: Case, layer: Any) -> None:
    """create_graph goes through `reference`: an old-style Function alone would give zeros and say nothing."""
    check_second(layer, Problem.draw(case))


def test_second_derivatives_of_bf16_arrive() -> None:
    """The recomputation serves every dtype of the kernels."""
    check_second(rnn_layer, Problem.draw(Case("lstm", torch.bfloat16, T=3, H=9)))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "lstm": fastseq.functional.lstm,
    "gru": fastseq.functional.gru,
    "gru_reset_before": lambda *args, **options: fastseq.functional.gru(*args, reset_after=False, **options),
}


@pytest.mark.parametrize("cell", FUNCTIONS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("lengths", [None, [2, 0, 3]], ids=["full", "lengths"])
@pytest.mark.parametrize("two", [False, True], ids=["one_way", "two_ways"])
def test_numeric_derivatives_in_float64(cell: str, backend: str, lengths: list[int] | None, two: bool) -> None:
    """gradcheck and gradgradcheck of the backends that take float64, two layers deep."""
    if (cell, backend) == ("gru_reset_before", "torch"):
        return  # refused: test_dispatch
    steps, batch, features, hidden, dirs = 3, 3, 2, 2, 1 + two
    gates, names = GATES[cell[:4].rstrip("_")], ("h", "c") if cell == "lstm" else ("h",)
    weights = []
    for size in (features, dirs * hidden):
        shapes = [(gates * hidden, size), (gates * hidden, hidden), (gates * hidden,), (gates * hidden,)]
        weights += [torch.randn(s, dtype=torch.float64) * 0.5 for _ in range(dirs) for s in shapes]
    x = torch.randn(steps, batch, features, dtype=torch.float64)
    states = [torch.randn(2 * dirs, batch, hidden, dtype=torch.float64) for _ in names]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        x, states, weights = inputs[0], inputs[1 : 1 + len(names)], inputs[1 + len(names) :]
        hx = states if cell == "lstm" else states[0]
        out, final = FUNCTIONS[cell](x, hx, weights, lengths=lengths, bidirectional=two, backend=backend)
        return (out, *final) if cell == "lstm" else (out, final)

    inputs = [t.requires_grad_() for t in (x, *states, *weights)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_create_graph_when_inputs_are_related(cell: str) -> None:
    """An initial state made of the input, and one weight used twice: each path counts once."""
    gates = GATES[cell]
    x, w = torch.randn(4, 3, 5, requires_grad=True), torch.randn(gates * 5, 5, requires_grad=True)
    h0 = x.mean(0, keepdim=True).tanh()
    out = rnn_layer(cell, x, h0, h0 if cell == "lstm" else None, [w, w], None, None, None, False, False)[0]
    loss = out.pow(2).sum()
    once = torch.autograd.grad(loss, (x, w), retain_graph=True)
    recorded = torch.autograd.grad(loss, (x, w), create_graph=True)
    for a, b in zip(once, recorded, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-5)


class NoGradient(torch.autograd.Function):
    """Passes its input on and sends back None, which is how a gradient comes to be undefined."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return (None,) * len(grads)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_no_gradient_at_all(cell: str, create_graph: bool) -> None:
    """Every incoming gradient undefined: the outgoing ones are too."""
    problem = Problem.draw(Case(cell))
    leaves = {n: t.clone().requires_grad_() for n, t in problem.tensors.items()}
    cut = NoGradient.apply(*problem.call(rnn_layer, leaves).values())
    found = torch.autograd.grad(
        sum(t.sum() for t in cut), list(leaves.values()), create_graph=create_graph, allow_unused=True
    )
    assert all(d is None for d in found)


def test_changed_saved_tensors_are_refused() -> None:
    """A weight changed in place between forward and backward would give a wrong gradient in silence."""
    problem = Problem.draw(Case())
    leaves = {n: t.clone().requires_grad_() for n, t in problem.tensors.items()}
    out = problem.call(rnn_layer, leaves)["out"]
    with torch.no_grad():
        leaves["w_hh.0"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_changed_outputs_are_refused(kind: str, options: dict[str, bool]) -> None:
    """As under cuDNN: backward reads them; and the error names the way out."""
    layer, x = getattr(fastseq, kind)(4, 4, backend="cpu", **options), torch.randn(3, 2, 4)
    out, _ = layer(x)
    out += x
    with pytest.raises(RuntimeError, match=r"inplace operation.* write out = out \+ x"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """Saved tensors may be dropped and made again."""
    module, x = fastseq.LSTM(4, 5, backend="cpu"), torch.randn(3, 2, 4, requires_grad=True)
    wanted = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x)[0].sum(), wanted)
    x.grad = None
    checkpoint(module, x, use_reentrant=reentrant)[0].sum().backward()
    for t, d in zip(wanted, expected, strict=True):
        assert t.grad is not None
        assert torch.equal(t.grad, d)


def rnn(cell: str) -> tuple[torch.nn.Module, dict[str, Tensor], Callable[..., Tensor]]:
    """A bidirectional module on the cpu backend, its parameters, and a loss of (parameters, input, state)."""
    module = (fastseq.LSTM if cell == "lstm" else fastseq.GRU)(3, 4, bidirectional=True, backend="cpu")

    def loss(params: dict[str, Tensor], x: Tensor, h: Tensor) -> Tensor:
        out, _ = torch.func.functional_call(module, params, (x, (h, h) if cell == "lstm" else h))
        return out.sin().sum()

    return module, {n: p.detach() for n, p in module.named_parameters()}, loss


def assert_trees_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within ten units in the last place of the largest value: two ways through fp32."""
    for name, t in expected.items():
        tolerance = 10 * torch.finfo(t.dtype).eps * max(1.0, t.abs().max().item())
        assert (got[name] - t).abs().max().item() <= tolerance, name


@pytest.mark.parametrize("cell", CELLS)
def test_func_grad(cell: str) -> None:
    """torch.func.grad equals autograd."""
    _, params, loss = rnn(cell)
    x, h = torch.randn(5, 2, 3), torch.randn(2, 2, 4)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    expected = torch.autograd.grad(loss(leaves, x, h), list(leaves.values()))
    got = torch.func.grad(loss)(params, x, h)
    assert_trees_close(got, dict(zip(leaves, expected, strict=True)))


@pytest.mark.parametrize("cell", CELLS)
def test_per_sample_gradients(cell: str) -> None:
    """vmap over grad: the gradient of each row by itself."""
    _, params, loss = rnn(cell)
    xs, hs = torch.randn(6, 5, 1, 3), torch.randn(6, 2, 1, 4)
    got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, xs, hs)
    each = [torch.func.grad(loss)(params, x, h) for x, h in zip(xs, hs, strict=True)]
    assert_trees_close(got, {n: torch.stack([g[n] for g in each]) for n in params})


@pytest.mark.parametrize("cell", CELLS)
def test_vmap_over_weights(cell: str) -> None:
    """An ensemble: parameters stacked, the input shared."""
    _, params, loss = rnn(cell)
    stacked = {n: torch.stack([p, 2 * p, -p]) for n, p in params.items()}
    x, h = torch.randn(5, 2, 3), torch.randn(2, 2, 4)
    got = torch.func.vmap(loss, (0, None, None))(stacked, x, h)
    each = torch.stack([loss({n: p[k] for n, p in stacked.items()}, x, h) for k in range(3)])
    assert_trees_close({"loss": got}, {"loss": each})


@pytest.mark.parametrize("cell", CELLS)
def test_forward_mode(cell: str) -> None:
    """The tangent arrives, through torch.func.jvp and through dual tensors."""
    _, params, loss = rnn(cell)
    x, h, direction = torch.randn(5, 2, 3), torch.randn(2, 2, 4), torch.randn(5, 2, 3)
    expected = (torch.func.grad(loss, argnums=1)(params, x, h) * direction).sum()
    _, tangent = torch.func.jvp(lambda x: loss(params, x, h), (x,), (direction,))
    assert_trees_close({"tangent": tangent}, {"tangent": expected})
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(params, forward_ad.make_dual(x, direction), h))
    assert dual.tangent is not None
    assert_trees_close({"tangent": dual.tangent}, {"tangent": expected})


@pytest.mark.parametrize("grad", [False, True])
def test_fake_tensors_have_no_memory(grad: bool) -> None:
    """Shape inference outside torch.compile: an address of a fake tensor must never reach a kernel."""
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        module = fastseq.GRU(4, 5, bidirectional=True, backend="cpu")
        out, h = module(torch.randn(3, 2, 4))
        assert (out.shape, h.shape) == ((3, 2, 10), (2, 2, 5))
        if grad:
            out.sum().backward()
            assert module.weight_hh_l0.grad is not None
            assert module.weight_hh_l0.grad.shape == (15, 5)


def arguments(problem: Problem, save: bool = True) -> tuple[Any, ...]:
    """Those of rnn_forward, but for the masks."""
    t, case = problem.tensors, problem.case
    weights = [w for n, w in t.items() if n[:2] in ("w_", "b_")]
    return (
        case.cell, t["x"], t.get("h0"), t.get("c0"), weights, problem.lengths, problem.resets, problem.batch_sizes,
        case.batch_first, case.bidirectional, save,
    )  # fmt: skip


no_alias = pytest.mark.filterwarnings("error:.*may not alias")
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
OPERATOR = [
    Case("lstm", rows="full", bidirectional=True, batch_first=True),
    Case("lstm", torch.bfloat16, rows="packed", state=torch.float32),
    Case("gru", rows="full", hx=False, bias=False),
    Case("lstm", bidirectional=True, resets=True),
    Case("lstm", bidirectional=True, rows="packed", noise="update", states=True),
    Case("gru", noise="zoneout"),
    Case("lstm", hx=False, noise="state"),
]


@no_alias
@pytest.mark.parametrize("case", OPERATOR, ids=str)
@pytest.mark.parametrize("save", [False, True])
def test_opcheck_forward(case: Case, save: bool) -> None:
    """Schema, fake kernel and tracing of rnn_forward agree with what it does."""
    problem = Problem.draw(case)
    args = (*arguments(problem, save), problem.extras.masks, problem.extras.rates, problem.extras.states)
    torch.library.opcheck(torch.ops.fastseq.rnn_forward.default, args, test_utils=CHECKS)


@no_alias
@pytest.mark.parametrize("case", OPERATOR, ids=str)
@pytest.mark.parametrize("needs", [(True,) * 4, (False, True, False, False)], ids=["all", "h0"])
def test_opcheck_backward(case: Case, needs: tuple[bool, ...]) -> None:
    """The same of rnn_backward."""
    problem = Problem.draw(case)
    *call, _ = args = arguments(problem)
    masks, rates = problem.extras.masks, problem.extras.rates
    out, _, _, _, gates, cells = torch.ops.fastseq.rnn_forward(*args, masks, rates, problem.extras.states)
    grads = [problem.grads.get(name) for name in ("out", "h_n", "c_n", "c_out")]
    inputs = (call[0], *grads, *call[1:], out, gates, cells, list(needs), masks, rates)
    torch.library.opcheck(torch.ops.fastseq.rnn_backward.default, inputs, test_utils=CHECKS)


def test_the_operator_is_the_kernel() -> None:
    """Called through the dispatcher, as compiled code does, it gives the bits of the direct call."""
    args = arguments(Problem.draw(Case("lstm", rows="lengths", bidirectional=True, resets=True)))
    direct = ops._forward(*args, NONE)[:3]
    for a, b in zip(torch.ops.fastseq.rnn_forward(*args, [], [], False)[:3], direct, strict=True):
        assert torch.equal(a, b)

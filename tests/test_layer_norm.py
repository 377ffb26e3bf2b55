"""Layer-normalised LSTM and GRU: kernels and reference against an oracle of their own, modules, what they refuse."""

import copy
import itertools
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq
from fastseq import InputError, _native
from fastseq.backends import reference
from fastseq.ops.rnn_norm import rnn_norm_layer
from tests.conftest import needs_native
from tests.isa import VARIANTS, choose
from tests.norm_oracle import CELLS, NormProblem, check_norm, check_norm_second
from tests.oracle import Case, check_backward_changes_nothing, run

FP32, BF16 = torch.float32, torch.bfloat16
ROWS = ("full", "lengths", "packed")
LAYERS = [reference.layer] if _native.C is None else [reference.layer, rnn_norm_layer]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=["reference", "cpu"][: len(LAYERS)])
BACKENDS = ["reference"] if _native.C is None else ["reference", "cpu"]
every_cell = pytest.mark.parametrize("cell", CELLS)
KINDS = ("LSTM", "GRU")
every_kind = pytest.mark.parametrize("kind", KINDS)


def cases() -> list[Case]:
    """Cells, dtypes, rows and directions crossed; the other options take turns."""
    turns, found = itertools.cycle(itertools.product((True, False), repeat=4)), []
    for cell, dtype, rows, two in itertools.product(CELLS, (FP32, BF16), ROWS, (False, True)):
        hx, bias, batch_first, more = next(turns)
        batch_first, resets = batch_first and rows != "packed", more and rows != "packed"
        state = FP32 if hx and more else None
        shape = (6, 5, 7, 20) if more else (3, 9, 4, 33)
        found.append(Case(cell, dtype, *shape, two, rows, hx, bias, batch_first, state, 1 + len(found) % 2, resets))
    return found


@every_layer
@pytest.mark.parametrize("case", cases(), ids=str)
def test_layer(layer: Any, case: Case) -> None:
    """Outputs and every gradient against the oracle."""
    check_norm(layer, NormProblem.draw(case))


CORNERS = [  # T, B, I, H
    (1, 1, 1, 2),
    (1, 3, 5, 16),  # one step
    (4, 3, 2, 3),  # less than any vector
    (20, 1, 3, 130),  # one row
    (2, 13, 58, 67),  # several tiles of rows
]


@needs_native
@every_cell
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", CORNERS, ids=str)
def test_corner_shapes(cell: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    check_norm(rnn_norm_layer, NormProblem.draw(Case(cell, dtype, *shape)))


@needs_native
@every_cell
def test_statistics_of_one_number(cell: str) -> None:
    """N of one number is 0, of two about 1 and -1: their gradients are all cancellation, which 16 bits do not have."""
    check_norm(rnn_norm_layer, NormProblem.draw(Case(cell, FP32, 3, 2, 1, 1)))


NOISE = ("zoneout", "mean", "state", "update", "both", "")


def noisy() -> list[Case]:
    """Cells, dtypes and kinds of noise crossed; the other options take turns. "" is every cell state alone."""
    turns, found = itertools.cycle(itertools.product((True, False), repeat=4)), []
    for k, (cell, dtype, noise) in enumerate(itertools.product(CELLS, (FP32, BF16), NOISE)):
        (hx, two, batch_first, more), rows = next(turns), ROWS[(k + k // len(NOISE)) % 3]
        batch_first, resets = batch_first and rows != "packed", more and rows != "packed"
        state, shape = FP32 if hx and more else None, (6, 5, 7, 20) if more else (3, 9, 4, 33)
        states = cell == "lstm" and (more or not noise)
        if noise or states:
            found.append(
                Case(
                    cell, dtype, *shape, two, rows, hx, True, batch_first, state, 1 + len(found) % 2, resets, noise,
                    states,
                )
            )  # fmt: skip
    return found


@every_layer
@pytest.mark.parametrize("case", noisy(), ids=str)
def test_noise(layer: Any, case: Case) -> None:
    """Zoneout, dropout within the recurrence and every cell state beside layer normalisation."""
    check_norm(layer, NormProblem.draw(case))


@needs_native
@every_cell
@pytest.mark.parametrize("shape", CORNERS, ids=str)
def test_noise_in_corner_shapes(cell: str, shape: tuple[int, int, int, int]) -> None:
    """Not in 16 bits: of three units dropout may leave one, and a product as good as 0 to be normalised."""
    check_norm(rnn_norm_layer, NormProblem.draw(Case(cell, FP32, *shape, True, noise="both", states=True)))


SMALL = [Case(cell, T=3, B=3, I=2, H=5, rows=rows, bidirectional=True) for cell, rows in itertools.product(CELLS, ROWS)]
SMALL += [Case(cell, T=4, B=3, I=2, H=5, resets=True) for cell in CELLS]
SMALL += [
    Case(cell, T=3, B=3, I=2, H=5, rows="lengths", bidirectional=True, noise=noise, states=True)
    for cell, noise in itertools.product(CELLS, ("both", "mean"))
]
small_case = pytest.mark.parametrize("case", SMALL, ids=str)


@every_layer
@small_case
def test_second_derivatives(layer: Any, case: Case) -> None:
    check_norm_second(layer, NormProblem.draw(case))


@every_layer
@small_case
def test_backward_changes_nothing(layer: Any, case: Case) -> None:
    check_backward_changes_nothing(layer, NormProblem.draw(case))


@needs_native
@every_cell
@pytest.mark.parametrize("used", [("out",), ("h_n",), ("c_n",)], ids="+".join)
def test_gradients_of_some_outputs(cell: str, used: tuple[str, ...]) -> None:
    """The others' are undefined, which stands for 0; a state in fp32 beside bf16."""
    problem = NormProblem.draw(Case(cell, BF16, rows="lengths", state=FP32))
    grads = {name: g for name, g in problem.grads.items() if name in used}
    check_norm(rnn_norm_layer, replace(problem, grads=grads or problem.grads))  # a GRU has no c_n


@needs_native
@every_cell
@pytest.mark.parametrize("wanted", [["x"], ["h0"], ["w_hh.0", "b_ih.1"], ["w_n_hh.1"]], ids="+".join)
def test_gradients_of_some_inputs(cell: str, wanted: list[str]) -> None:
    """What needs no gradient is not computed, and the rest keeps its bits; so do outputs without any gradient."""
    problem = NormProblem.draw(Case(cell, bidirectional=True, rows="lengths"))
    everything = run(rnn_norm_layer, problem)
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in problem.tensors.items()}
    outputs = problem.call(rnn_norm_layer, leaves)
    given = [problem.grads[n] for n in outputs]
    found = torch.autograd.grad(list(outputs.values()), [leaves[n] for n in wanted], given)
    for name, d in zip(wanted, found, strict=True):
        assert torch.equal(d, everything[f"d_{name}"]), name
    with torch.no_grad():
        for name, t in problem.call(rnn_norm_layer, problem.tensors).items():
            assert torch.equal(t, everything[name]), name


@needs_native
@every_cell
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("rows", "threads", "noise"), [(11, 2, ""), (11, 3, "both"), (11, 5, ""), (33, 2, "")])
def test_threads_give_the_same_bits(cell: str, dtype: torch.dtype, rows: int, threads: int, noise: str) -> None:
    """Of all but the gains' and biases' gradients, whose sums threads share."""
    problem = NormProblem.draw(Case(cell, dtype, 20, rows, 9, 70, True, "lengths", noise=noise))
    single = run(rnn_norm_layer, problem)
    torch.set_num_threads(threads)
    shared = run(rnn_norm_layer, problem)
    for name in ("out", "h_n"):
        assert torch.equal(shared[name], single[name]), name
    check_norm(rnn_norm_layer, replace(problem, case=replace(problem.case, threads=threads)))
    again = run(rnn_norm_layer, problem)
    assert all(torch.equal(again[name], t) for name, t in shared.items())


@needs_native
@every_cell
@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(5, 9, 13, 17), (3, 7, 33, 35)], ids=str)
def test_every_isa(cell: str, isa: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """What a slower CPU would run."""
    choose(isa)
    for noise in ("", "both"):
        case = Case(cell, dtype, *shape, True, "lengths", resets=True, noise=noise, states=bool(noise))
        check_norm(rnn_norm_layer, NormProblem.draw(case))


@needs_native
@every_kind
def test_nan_stays_in_its_row(kind: str) -> None:
    module = build(kind)
    x = torch.randn(6, 8, 5)
    expected, _ = module(x)
    x[3, 2] = torch.nan
    out, _ = module(x)
    others = [row for row in range(8) if row != 2]
    assert torch.equal(out[:, others], expected[:, others])
    assert out[3:, 2].isnan().all()
    assert torch.equal(out[:3, 2], expected[:3, 2])


def build(kind: str, backend: str = "cpu", **options: Any) -> Any:
    """A module with gains and biases that are not those of the start."""
    torch.manual_seed(0)
    backend = "reference" if backend == "cpu" and _native.C is None else backend
    module = getattr(fastseq, kind)(5, 9, layer_norm=True, backend=backend, **options)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.startswith(("norm", "initial")):
                p.add_(torch.randn_like(p), alpha=0.3)
    return module


def answers(module: Any, x: Any, *given: Any, **more: Any) -> list[Tensor]:
    """Outputs, states and the parameters' gradients."""
    torch.manual_seed(5)
    out, state = module(x, *given, **more)
    data = out.data if isinstance(out, PackedSequence) else out
    states = state if isinstance(state, tuple) else (state,)
    loss = data.float().sin().sum() + sum(s.float().cos().sum() for s in states)
    return [data, *states, *torch.autograd.grad(loss, list(module.parameters()))]


def close(got: list[Tensor], expected: list[Tensor], rtol: float = 1e-4) -> None:
    """Within `rtol` of each tensor's largest value: fp32 sums in another order, divided by deviations."""
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * b.abs().max().item())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False},
    {"num_layers": 2, "dropout": 0.5},
    {"learn_state": True, "bidirectional": True},
    {"zoneout": 0.2, "num_layers": 2},
    {"recurrent_dropout": 0.3},
]


@every_kind
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", ["padded", "hx", "lengths", "packed", "unbatched", "resets"])
def test_auto_agrees_with_reference(kind: str, options: dict[str, Any], rows: str) -> None:
    """Every way to call a module; `auto` takes the fused kernels."""
    if rows == "resets" and options.get("learn_state"):
        with pytest.raises(InputError, match="resets with learn_state"):
            build(kind, **options)(torch.randn(7, 3, 5), resets=torch.zeros(7, 3, dtype=torch.bool))
        return
    module, expected = build(kind, "auto", **options), build(kind, "reference", **options)
    x: Any = torch.randn(7, 5) if rows == "unbatched" else torch.randn(4, 4, 5)
    given: list[Any] = []
    more: dict[str, Any] = {}
    if rows == "packed":
        x = pack_padded_sequence(x, [2, 4, 4, 1], module.batch_first, enforce_sorted=False)
    elif rows == "lengths":
        more["lengths"] = [2, 4, 0, 3]
    elif rows == "resets":
        more["resets"] = torch.rand(4, 4) < 0.3
    elif rows == "hx":
        h = torch.randn(module.num_layers * (2 if module.bidirectional else 1), 4, 9)
        given = [(h, h * 0.5) if kind == "LSTM" else h]
    if rows == "hx" and options.get("learn_state"):
        module.learn_state = expected.learn_state = False  # gradients for initial states do not arrive
        for m in (module, expected):
            for name in ("initial_h", "initial_c"):
                m._parameters.pop(name, None)
    close(answers(module, x, *given, **more), answers(expected, x, *given, **more))
    if rows == "padded":
        found = fastseq.explain(module, x)
        assert found.chosen == ("reference" if _native.C is None else "cpu")
        reasons = {v.backend: v.reason for v in found}
        noisy = bool({"zoneout", "recurrent_dropout"} & set(options))
        assert "no layer normalisation" in reasons["torch"] or noisy


@every_kind
def test_normalised_sums(kind: str) -> None:
    """What the paper promises: the outputs do not change with the scale of W_ih and W_hh."""
    module = build(kind, bias=False)
    x = torch.randn(6, 3, 5)
    out, _ = module(x)
    with torch.no_grad():
        module.weight_ih_l0.mul_(30.0)
        module.weight_hh_l0.mul_(30.0)
    again, _ = module(x)
    torch.testing.assert_close(again, out, rtol=0, atol=2e-3)  # the eps of a variance 900 times as large


@every_kind
@pytest.mark.parametrize("bias", [True, False])
def test_parameters(kind: str, bias: bool) -> None:
    """Names, shapes, draws: torch's, and behind them gains of 1 and a bias of 0, which draw nothing."""
    torch.manual_seed(3)
    stock = getattr(nn, kind)(5, 9, 2, bias=bias, bidirectional=True)
    after = torch.rand(1)
    torch.manual_seed(3)
    module = getattr(fastseq, kind)(5, 9, 2, bias=bias, bidirectional=True, layer_norm=True)
    assert torch.equal(torch.rand(1), after)
    state = module.state_dict()
    assert list(state)[: len(stock.state_dict())] == list(stock.state_dict())
    assert all(torch.equal(state[name], t) for name, t in stock.state_dict().items())
    names = ["norm_ih", "norm_hh"] + (["norm_c", "norm_c_bias"] if kind == "LSTM" else [])
    ends = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    assert list(state)[len(stock.state_dict()) :] == [name + end for end in ends for name in names]
    wide = module.weight_hh_l0.shape[0]
    for name in names:
        values = state[f"{name}_l1_reverse"]
        assert values.shape == ((wide,) if name in ("norm_ih", "norm_hh") else (9,))
        assert values.eq(0.0 if name == "norm_c_bias" else 1.0).all()
    with torch.no_grad():
        module.norm_hh_l1.fill_(7.0)
    module.reset_parameters()
    assert module.norm_hh_l1.eq(1.0).all()
    assert "layer_norm=True" in repr(module)


@every_kind
def test_copies_files_and_other_weights(kind: str) -> None:
    """deepcopy, pickle, state_dict, functional_call and .to() keep what is normalised by what."""
    module, x = build(kind, num_layers=2), torch.randn(4, 3, 5)
    expected, _ = module(x)
    fresh = getattr(fastseq, kind)(5, 9, 2, layer_norm=True, backend=module.backend)
    changed, _ = torch.func.functional_call(fresh, dict(module.named_parameters()), (x,))
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert torch.equal(other(x)[0], expected)
    assert torch.equal(changed, expected)
    halved = copy.deepcopy(module).to(BF16)
    built = getattr(fastseq, kind)(5, 9, 2, layer_norm=True, backend=module.backend, dtype=BF16)
    built.load_state_dict(module.state_dict())  # rounds as .to() does
    assert torch.equal(halved(x.to(BF16))[0], built(x.to(BF16))[0])
    halved.norm_hh_l0 = nn.Parameter(halved.norm_hh_l0.float())
    with pytest.raises(InputError, match=r"norms\[1\] is torch\.float32"):
        halved(x.to(BF16))
    fresh.norm_hh_l0 = nn.Parameter(torch.ones(3))
    with pytest.raises(InputError, match="norms have shapes"):
        fresh(x)
    frozen = fastseq.freeze(module)
    with torch.no_grad():
        assert torch.equal(frozen(x)[0], expected)
    if _native.C is not None:
        assert "without its frozen weights: the kernels of layer normalisation" in str(fastseq.explain(frozen, x))


@every_kind
def test_no_rows_and_long_sequences(kind: str) -> None:
    module = build(kind)
    x = torch.randn(4, 0, 5, requires_grad=True)
    out, _ = module(x)
    out.sum().backward()
    assert out.shape == (4, 0, 9)
    assert x.grad is not None
    for name, p in module.named_parameters():
        assert p.grad.eq(0).all(), name
    whole, _ = module(torch.ones(3000, 2, 5))
    whole.sum().backward()
    assert module.norm_hh_l0.grad.isfinite().all()


@every_kind
def test_streaming(kind: str) -> None:
    """Chunks with hx handed on give what the whole does."""
    module, x = build(kind, num_layers=2), torch.randn(9, 3, 5)
    whole, last = module(x)
    parts, state = [], None
    for chunk in x.split([1, 5, 3]):
        out, state = module(chunk, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)
    for a, b in zip(*((s if isinstance(s, tuple) else (s,)) for s in (state, last)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_kind
@pytest.mark.parametrize("steps", [1, 5])
def test_autocast(kind: str, steps: int) -> None:
    """The dtypes of the plain layer; to the bit what the module gives in the dtype that autocast casts to."""
    x = torch.randn(steps, 4, 5)
    with torch.autocast("cpu", BF16):
        plain, _ = getattr(fastseq, kind)(5, 9)(x)
    low = BF16 if steps > 1 else FP32  # one step stays in the weights' dtype
    for backend in BACKENDS:
        module = build(kind, backend)
        with torch.autocast("cpu", BF16):
            got = module(x)
        assert got[0].dtype == plain.dtype
        cast = copy.deepcopy(module).to(low)
        for a, b in zip(graded(module, got, plain.dtype), graded(cast, cast(x.to(low)), plain.dtype), strict=True):
            assert torch.equal(a, b), backend


def graded(module: nn.Module, results: Any, dtype: torch.dtype) -> list[Tensor]:
    """Output and states in `dtype`, and the parameters' gradients, taken where autocast is off."""
    out, state = results
    found = [t.to(dtype) for t in (out, *(state if isinstance(state, tuple) else (state,)))]
    loss = sum(t.float().sin().sum() for t in found)
    return [*found, *(d.float() for d in torch.autograd.grad(loss, list(module.parameters())))]


@needs_native
@pytest.mark.parametrize(("kind", "rows"), [("LSTM", "full"), ("GRU", "lengths")])
def test_compile_without_a_break(kind: str, rows: str) -> None:
    module, x = build(kind, bidirectional=True), torch.randn(4, 3, 5)
    more = {"lengths": torch.tensor([4, 2, 3])} if rows == "lengths" else {}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = answers(module, x, **more)

    torch.manual_seed(5)
    out, state = compiled(x, **more)
    loss = out.sin().sum() + sum(s.cos().sum() for s in (state if kind == "LSTM" else (state,)))
    close(
        [out, *torch.autograd.grad(loss, list(module.parameters()))],
        [expected[0], *expected[-len(list(module.parameters())) :]],
    )


@needs_native
@every_cell
@pytest.mark.parametrize("rows", ROWS)
def test_operator_contract(cell: str, rows: str) -> None:
    """Schema, fake kernels and registrations are sound."""
    problem = NormProblem.draw(Case(cell, rows=rows, noise="both" if rows == "lengths" else ""))
    t = problem.tensors
    weights = [t[name] for name in ("w_ih.0", "w_hh.0", "b_ih.0", "b_hh.0")]
    norms = [v for name, v in t.items() if name.startswith("w_n_")]
    x = t["x"].nan_to_num()
    noise, lstm = (problem.extras.masks, problem.extras.rates), cell == "lstm"
    given = (x, t["h0"], t.get("c0"), problem.lengths, None, problem.batch_sizes, weights, norms, False, False, *noise)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastseq.rnn_norm_forward.default, (cell, *given, lstm, True), test_utils=tests)
    out, h_n, c_n, *saved, c_out = torch.ops.fastseq.rnn_norm_forward.default(cell, *given, lstm, True)
    args = (cell, out, h_n, *((c_n, c_out) if lstm else (None, None)), *given, out, *saved, [True] * 4)
    torch.library.opcheck(torch.ops.fastseq.rnn_norm_backward.default, args, test_utils=tests)


@every_kind
def test_transforms(kind: str) -> None:
    """Per-sample gradients and forward-mode ones, which the reference gives."""
    module, x = build(kind), torch.randn(4, 3, 5)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss(params: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(module, params, (row[:, None],))[0].sin().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 1))(params, x)
    module(x)[0].sin().sum().backward()
    close([each[name].sum(0) for name in params], [module.get_parameter(name).grad for name in params])
    batched = torch.autograd.grad(
        module(x)[0].sum((1, 2)), list(module.parameters()), torch.eye(4), is_grads_batched=True
    )
    singly = [
        torch.autograd.grad(row, list(module.parameters()), retain_graph=True) for row in module(x)[0].sum((1, 2))
    ]
    close(list(batched), [torch.stack(rows) for rows in zip(*singly, strict=True)])
    tangent = torch.randn_like(x)
    _, slope = torch.func.jvp(lambda x: module(x)[0].sin().sum(), (x,), (tangent,))
    leaf = x.clone().requires_grad_()
    (d,) = torch.autograd.grad(module(leaf)[0].sin().sum(), leaf)
    torch.testing.assert_close(slope, (d * tangent).sum(), rtol=1e-4, atol=1e-4)


def test_refusals() -> None:
    """When built where possible, with the reason and the remedy."""
    with pytest.raises(InputError, match=r"layer_norm=True with proj_size=3; use one of the two"):
        fastseq.LSTM(5, 8, proj_size=3, layer_norm=True)
    with pytest.raises(InputError, match=r"layer_norm=True of RNN, .*use fastseq.LSTM or fastseq.GRU"):
        fastseq.RNN(5, 8, layer_norm=True)
    x = torch.randn(3, 2, 5)
    with pytest.raises(InputError, match="no layer normalisation within the recurrence"):
        fastseq.LSTM(5, 8, layer_norm=True, backend="torch")(x)
    with pytest.raises(InputError, match=r"has no layer_norm=True"):
        torch.jit.script(fastseq.LSTM(5, 8, layer_norm=True))
    out, _, cells = fastseq.LSTM(5, 8, layer_norm=True).forward_states(x)
    assert cells.shape == out.shape

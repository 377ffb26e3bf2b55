"""Every backend's attention and attention decoder against the plain loops, forward and every gradient."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import dispatch, engine
from fastseq.backends.decoder_call import AttentionCall, DecoderCall
from fastseq.spec import AttentionParams, DecoderOutput, DecoderParams, DecoderSpec, DecoderState, DropoutMasks, Keys
from tests.decoder_oracle import PRESETS, AttentionCase, Case, Problem, check, check_second, fast, preset, run

BACKENDS = [
    n for n, m in dispatch.OPERATORS["decoder"].modules.items() if dispatch.load(n, "decoder").unavailable() is None
]
CELLS = ("lstm", "gru", "gru_reset_before")
UNATTENDING = ("sutskever", "cho")
SOME = ("bahdanau", "luong", "gnmt", "conditional_gru")  # one of each order
GRID = [
    preset(name, cell, score=score)
    for name in PRESETS
    for cell in CELLS
    for score in ("additive", "dot")
    if (score == "additive" or name not in UNATTENDING) and (name, cell) != ("cho", "gru_reset_before")
]
OPTIONS: dict[str, dict[str, Any]] = {
    "no mask": {"mask": "none"},
    "lengths": {"mask": "prefix"},
    "no dropout": {"dropout": False},
    "no weights": {"weights": False},
    "one row for each of the keys": {"B": 6},
    "one row": {"N": 1, "B": 1, "mask": "prefix"},
    "five beams": {"N": 5, "B": 1, "mask": "prefix"},
    "one step": {"T": 1},
    "one source position": {"S": 1, "mask": "none"},
    "no source": {"S": 0},
    "short sources": {"N": 2, "B": 2, "T": 9, "S": 3, "D": 32},
    "smallest": {"N": 1, "B": 1, "T": 1, "S": 1, "A": 1, "D": 1, "I": 1, "H": 1, "R": 1, "mask": "none"},
    "whole vectors": {"N": 4, "B": 4, "S": 16, "A": 32, "D": 32, "I": 16, "H": 32, "R": 32},
    "odd": {"N": 9, "B": 3, "T": 3, "S": 37, "A": 33, "D": 65, "I": 1, "H": 35, "R": 31},
    "two threads": {"threads": 2, "N": 8, "B": 4},
    "more rows than a tile": {"N": 34, "B": 17, "T": 2, "threads": 2},
    "short sources and many steps": {"N": 2, "B": 1, "S": 3, "D": 14, "T": 9, "mask": "none"},
    "readout bias": {"bias": True},
    "two layers": {"num_layers": 2},
}
EVEN = {"I": 8, "A": 18, "D": 14, "R": 16}  # sizes that every backend takes in bf16
backends = pytest.mark.parametrize("backend", BACKENDS)
some = pytest.mark.parametrize("name", SOME)


@backends
@pytest.mark.parametrize("case", GRID, ids=str)
def test_presets(case: Case, backend: str) -> None:
    """Presets, cells and scores, in fp32 with everything that a call may have, and in bf16."""
    check(fast(backend), case)
    state = torch.float32 if "gru" in case.name else None
    check(fast(backend), replace(case, dtype=torch.bfloat16, state=state, **EVEN))


FIXED_DEPTH = ("gnmt", "conditional_gru")  # three layers, and one of two cells


@backends
@pytest.mark.parametrize(
    ("name", "options"),
    [(n, o) for n in SOME for o in OPTIONS if o != "two layers" or n not in FIXED_DEPTH],
)
def test_options(name: str, options: str, backend: str) -> None:
    changes = OPTIONS[options]
    check(fast(backend), preset(name, "lstm", **changes))
    check(fast(backend), preset(name, "gru", score="dot", **changes))


@backends
@pytest.mark.parametrize("score", ["additive", "dot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ["no mask", "lengths", "no weights", "one row", "five beams", "one step",
                                     "no source", "two threads"])  # fmt: skip
def test_attention(score: str, dtype: torch.dtype, options: str, backend: str) -> None:
    changes = {k: v for k, v in OPTIONS[options].items() if k in AttentionCase.__dataclass_fields__}
    check(fast(backend), AttentionCase(score, dtype=dtype, **changes))
    check(fast(backend), AttentionCase(score, dtype=dtype, **{"A": 33, "D": 17, "Q": 32, "S": 40, "T": 1} | changes))


@backends
@some
def test_second_derivatives(name: str, backend: str) -> None:
    check_second(fast(backend), preset(name, "gru", T=2, dropout=False))


@backends
def test_second_derivatives_of_attention(backend: str) -> None:
    check_second(fast(backend), AttentionCase())


@backends
@some
def test_steps_are_the_whole(name: str, backend: str) -> None:
    """T calls of one step each, the state handed on, give what one call of T steps gives."""
    call = decoder_call(preset(name, dropout=False))
    whole = decode(call, backend)
    state, outputs, weights = call.state, [], []
    for t in range(call.y.shape[1]):
        output, state, seen = decode(replace(call, y=call.y[:, t : t + 1], state=state), backend)
        outputs.append(output)
        weights.append(seen)
    assert_close(DecoderOutput(torch.cat(outputs, 1), state, torch.cat(weights, 1)), whole)


@backends
@some
def test_beams_read_the_keys_of_their_row(name: str, backend: str) -> None:
    """N = B * k rows against B keys are N rows against keys repeated k times."""
    call = decoder_call(preset(name))
    keys = Keys(*(None if t is None else t.repeat_interleave(2, 0) for t in call.keys))
    assert_close(decode(call, backend), decode(replace(call, keys=keys), backend))


@backends
@some
def test_any_strides(name: str, backend: str) -> None:
    """Transposed, sliced and expanded tensors are read as they lie."""
    call = decoder_call(preset(name, dropout=False))

    def strided(t: Tensor) -> Tensor:
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan) if t.is_floating_point() else t.repeat(1, 2)
        wide[..., ::2] = t
        return wide[..., ::2] if t.dim() == 1 else wide[..., ::2].transpose(0, 1).clone().transpose(0, 1)

    y = call.y.transpose(0, 1).contiguous().transpose(0, 1)
    memory = Keys(*(None if t is None else strided(t) for t in call.keys))
    layers = tuple(tuple(map(strided, layer)) for layer in call.params.layers)
    other = replace(call, y=y, keys=memory, params=call.params._replace(layers=layers))
    assert_close(decode(other, backend), decode(call, backend))
    flat = call.y[:, :1].expand_as(call.y)
    assert_close(decode(replace(call, y=flat), backend), decode(replace(call, y=flat.contiguous()), backend))


@backends
@some
def test_nan_stays_in_its_row(name: str, backend: str) -> None:
    """NaN in y, a state, or attended memory: the other rows' results keep their bits."""
    case = preset(name, N=6, B=6, mask="none", dropout=False)
    problem = Problem.draw(case)
    clean = run(fast(backend), problem)
    for bad in ("y", "h0.0", "memory", "keys"):
        tensors = {n: t.clone() for n, t in problem.tensors.items()}
        tensors[bad][2] = torch.nan
        got = run(fast(backend), replace(problem, tensors=tensors))
        others = torch.arange(6) != 2
        assert got["out"][2].isnan().any()
        for key in ("out", "weights", "h_n.0", "d_y", "d_h0.0", "d_memory", "d_keys"):
            assert torch.equal(got[key][others], clean[key][others]), (bad, key)


@backends
@some
def test_the_same_bits_every_time(name: str, backend: str) -> None:
    problem = Problem.draw(preset(name, N=18, B=9, H=35))
    torch.set_num_threads(2)
    first = run(fast(backend), problem)
    for _ in range(3):
        for key, t in run(fast(backend), problem).items():
            assert torch.equal(t, first[key]), key


@backends
@some
def test_backward_changes_nothing(name: str, backend: str) -> None:
    """Inputs, outputs and what was saved stay as they were: a second backward gives the same."""
    problem = Problem.draw(preset(name))
    leaves = {n: t.clone().requires_grad_() for n, t in problem.tensors.items()}
    outputs = fast(backend)(problem, leaves)
    before = {n: o.detach().clone() for n, o in outputs.items()}
    grads = [problem.grads[n].clone() for n in outputs]
    first, again = (
        torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads, retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(o, before[n]) for n, o in outputs.items())
    assert all(torch.equal(leaves[n].nan_to_num(), t.nan_to_num()) for n, t in problem.tensors.items())
    assert all(torch.equal(g, problem.grads[n]) for n, g in zip(outputs, grads, strict=True))


@backends
@some
def test_only_what_is_needed(name: str, backend: str) -> None:
    """Any subset of inputs may want gradients, and any subset of outputs may have one."""
    problem = Problem.draw(preset(name))
    full = run(fast(backend), replace(problem, grads={n: g * (n == "out") for n, g in problem.grads.items()}))
    for wanted in ({"y"}, {"memory"}, {"w_hh.0", "h0.0"}, {"w_out", "keys"}):
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in problem.tensors.items()}
        named = [t for n, t in leaves.items() if n in wanted]
        found = torch.autograd.grad(fast(backend)(problem, leaves)["out"], named, problem.grads["out"])
        for key, d in zip([n for n in leaves if n in wanted], found, strict=True):
            torch.testing.assert_close(d, full[f"d_{key}"], rtol=1e-5, atol=1e-6)


@backends
def test_autocast(backend: str) -> None:
    """All but the state in autocast's dtype, as if the tensors had been cast; fp64 stays as it is."""
    call = decoder_call(preset("bahdanau", **EVEN))
    with torch.autocast("cpu", torch.bfloat16):
        got = decode(call, backend)
    low = lower(call, torch.bfloat16)
    assert_close(got, decode(low, backend), exactly=True)
    assert (got.output.dtype, got.state.layers[0][0].dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        context, weights = fastseq.functional.attention(
            call.y[..., :1].expand(-1, -1, 20), call.keys, call.params.attention, need_weights=True, backend=backend
        )
        double = lower(call, torch.float64, torch.float64)
        assert decode(double, "reference").output.dtype == torch.float64
    assert context.dtype == weights.dtype == torch.bfloat16


@backends
@some
def test_compiled(name: str, backend: str) -> None:
    """torch.compile takes the whole decoder into one graph, backward too."""
    problem = Problem.draw(preset(name, T=2))
    step = torch.compile(lambda t: fast(backend)(problem, t), backend="aot_eager", fullgraph=True)
    got = run(lambda _, t: step(t), problem)
    for key, t in run(fast(backend), problem).items():
        torch.testing.assert_close(got[key], t, rtol=1e-5, atol=1e-6)


@backends
def test_vmap_and_per_sample_gradients(backend: str) -> None:
    """torch.func transforms: gradients of each row by itself."""
    call = decoder_call(preset("luong", N=3, B=3, T=2, dropout=False))

    def loss(w: Tensor, y: Tensor) -> Tensor:
        _, *rest = call.params.layers[0]
        params = call.params._replace(layers=((w, *rest),))
        alone = replace(call, params=params, y=y[None], keys=Keys(*(t if t is None else t[:1] for t in call.keys)),
                        state=DecoderState(((call.state.layers[0][0][:1], call.state.layers[0][1][:1]),),
                                           call.state.feed[:1]))  # fmt: skip
        return decode(alone, backend).output.square().sum()

    w = call.params.layers[0][0]
    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, call.y)
    for n in range(3):
        torch.testing.assert_close(together[n], torch.func.grad(loss)(w, call.y[n]), rtol=1e-4, atol=1e-5)


def test_auto_and_explain_agree_with_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for function in ("decoder", "attention"):
        for name in dispatch.OPERATORS[function].modules:
            backend = dispatch.load(name, function)
            monkeypatch.setattr(backend, function, spy(ran, name, getattr(backend, function)))
    monkeypatch.setattr(engine, "_plans", {})
    call = decoder_call(preset("bahdanau"))
    query = AttentionCall(call.y.repeat(1, 1, 3)[..., :20], call.keys, call.params.attention)
    for told, run_it in (
        (fastseq.explain(call), lambda: decode(call)),
        (fastseq.explain(query), lambda: fastseq.functional.attention(query.query, query.keys, query.params)),
    ):
        run_it()
        assert ran.pop() == told.chosen == BACKENDS[0]
        assert [v.backend for v in told] == list(dispatch.BACKENDS)
        with fastseq.use_backend("reference"):
            run_it()
        assert ran.pop() == "reference"
    with torch.autocast("cpu", torch.float16):
        assert fastseq.explain(call).chosen == "reference"
    assert fastseq.explain(lower(call, torch.float64, torch.float64)).chosen == "reference"
    with fastseq.use_backend("torch"), pytest.raises(fastseq.InputError, match="torch has no attention decoder; use"):
        decode(call)


def test_explain_asks_the_module() -> None:
    call = decoder_call(preset("luong"))

    class Parts(torch.nn.Module):
        backend = "reference"

        def as_call(self, y: Tensor, memory: Any) -> DecoderCall:
            return replace(call, y=y)

    assert fastseq.explain(Parts(), call.y, None).chosen == "reference"
    with pytest.raises(fastseq.InputError, match="y has shape"):
        fastseq.explain(Parts(), call.y[0], None)
    with pytest.raises(TypeError, match="takes no lengths"):
        fastseq.explain(Parts(), call.y, None, lengths=[1])


def test_one_query_a_row() -> None:
    """[N, Q] is [N, 1, Q] without the dimension."""
    problem = Problem.draw(AttentionCase(T=1))
    t = problem.tensors
    keys, params = Keys(t["keys"], t["memory"], problem.mask), AttentionParams(t["w_query"], t["w_v"])
    for weights in (True, False):
        one = fastseq.functional.attention(t["query"][:, 0], keys, params, need_weights=weights)
        many = fastseq.functional.attention(t["query"], keys, params, need_weights=weights)
        assert torch.equal(one[0], many[0][:, 0])
        assert (one[1] is None) == (many[1] is None) == (not weights)
        assert one[1] is None or torch.equal(one[1], many[1][:, 0])


def test_reverse() -> None:
    x = torch.arange(24).view(3, 4, 2)
    got = fastseq.functional.reverse(x, [3, 0, 4])
    assert got[0].equal(x[0, [2, 1, 0, 3]])
    assert got[1].equal(x[1])
    assert got[2].equal(x[2].flip(0))
    assert fastseq.functional.reverse(x, None).equal(x.flip(1))
    assert fastseq.functional.reverse(x[..., 0], torch.tensor([1, 2, 3], dtype=torch.int32))[2].tolist() == [
        20,
        18,
        16,
        22,
    ]
    assert fastseq.functional.reverse(x[:0], []).shape == (0, 4, 2)
    y = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: fastseq.functional.reverse(y, [3, 0, 4]), y)


def decoder_call(case: Case) -> DecoderCall:
    """The call that `fast` makes of a problem's tensors."""
    made: list[DecoderCall] = []

    def keep(y: Tensor, keys: Keys, state: DecoderState, params: DecoderParams, spec: DecoderSpec,
             *, dropout_masks: DropoutMasks, need_weights: bool, backend: str) -> DecoderOutput:  # fmt: skip
        made.append(DecoderCall(spec, y, keys, state, params, dropout_masks, need_weights))
        return DecoderOutput(y, state, None)

    problem = Problem.draw(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastseq.functional, "attention_decoder", keep)
        fast()(problem, problem.tensors)
    return made[0]


def decode(call: DecoderCall, backend: str = "auto") -> DecoderOutput:
    return fastseq.functional.attention_decoder(
        call.y, call.keys, call.state, call.params, call.spec, dropout_masks=call.masks, need_weights=call.need_weights,
        backend=backend,
    )  # fmt: skip


def lower(call: DecoderCall, dtype: torch.dtype, state: torch.dtype = torch.float32) -> DecoderCall:
    """The call with its tensors in `dtype`."""

    def cast(tree: Any, dtype: torch.dtype) -> Any:
        if isinstance(tree, tuple):
            parts = [cast(t, dtype) for t in tree]
            return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
        return tree if tree is None or not tree.is_floating_point() else tree.to(dtype)

    return replace(call, y=call.y.to(dtype), keys=cast(call.keys, dtype), state=cast(call.state, state),
                   params=cast(call.params, dtype), masks=cast(call.masks, dtype))  # fmt: skip


def assert_close(got: DecoderOutput, expected: DecoderOutput, exactly: bool = False) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(tuple(got), tuple(expected), equal_nan=False, **tolerance)


def spy(ran: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run_it(call: Any) -> Any:
        ran.append(name)
        return function(call)

    return run_it

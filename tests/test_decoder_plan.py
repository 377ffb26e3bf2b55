"""The fused CPU decoder: what loops and what does not, what is refused and why, and the loop's operator."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.autograd import forward_ad

import fastseq
from fastseq import _native
from fastseq.backends.decoder_call import DecoderCall, mapped
from fastseq.spec import DecoderOutput, DecoderSpec
from tests.decoder_oracle import PRESETS, Case, Problem, check, check_second, fast, plain, preset, run
from tests.isa import VARIANTS, choose
from tests.oracle import Terms, allow, compare
from tests.test_decoder import EVEN, assert_close, decode, decoder_call, lower
from tests.test_decoder_reference import any_case

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

from fastseq.ops import decoder as ops

cpu = importlib.import_module("fastseq.backends.decoder_cpu")
fused = importlib.import_module("fastseq.backends.decoder_fused")
UPPER = {"num_layers": 2, "query_layer": 0, "context_to": "upper"}
PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "sutskever": (PRESETS["sutskever"], "nothing loops"),
    "cho": (PRESETS["cho"], "loop of 1 layer"),
    "bahdanau": (PRESETS["bahdanau"], "loop of 1 layer, attention (before)"),
    "luong": (PRESETS["luong"], "loop of 1 layer, attention (after), readout"),
    "gnmt": (PRESETS["gnmt"], "loop of 1 layer, attention (after)"),
    "conditional_gru": (PRESETS["conditional_gru"], "loop of 1 layer, attention (between)"),
    "bentrevett": (PRESETS["bentrevett"], "loop of 1 layer, attention (before)"),
    "context for the readout": ({"num_layers": 2}, "nothing loops"),
    "context for upper layers, asked before": (UPPER, "nothing loops"),
    "context for upper layers, asked by one": (UPPER | {"query_layer": 1}, "loop of 2 layers, attention (before)"),
    "context for all layers": (
        {"num_layers": 3, "query_layer": 1, "context_to": "all"},
        "loop of 2 layers, attention (before)",
    ),
    "asked after, nothing fed": ({"num_layers": 2, "attend": "after"}, "nothing loops"),
    "fed context": (
        {"num_layers": 2, "query_layer": 0, "feed": "context"},
        "loop of 1 layer, attention (before)",
    ),
    "fed output": (
        {"num_layers": 2, "query_layer": 0, "feed": "output", "combine": "tanh"},
        "loop of 2 layers, attention (before), readout",
    ),
    "two cells and a fed output": (
        {"attend": "between", "feed": "output", "combine": "tanh"},
        "loop of 1 layer, attention (between), readout",
    ),
    "fed output without attention": (
        {"num_layers": 2, "attention": False, "readout": ("state",), "feed": "output", "combine": "linear"},
        "loop of 2 layers, readout",
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_loops(name: str) -> None:
    options, expected = PLANS[name]
    plan = fused.plan(DecoderSpec(**options))
    assert str(plan) == expected
    assert plan is fused.plan(DecoderSpec(**options))
    assert hash(plan) == hash(fused.make_plan(DecoderSpec(**options)))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_every_plan_computes_the_decoder(name: str, cell: str) -> None:
    if (name, cell) != ("cho", "gru_reset_before"):  # no such DecoderSpec
        check(fast("cpu"), Case(name=name, spec=DecoderSpec(cell=cell, **PLANS[name][0]), bias=True))


WIDE = ((torch.float32, 203), (torch.float32, 256), (torch.float32, 330), (torch.bfloat16, 204))


def check_one_wide_row(name: str, cell: str, steps: int) -> None:
    for dtype, hidden in WIDE:
        spec = DecoderSpec(cell=cell, **PLANS[name][0])
        sizes = {"N": 1, "B": 1, "T": steps, "I": 20, "A": 34, "D": 18, "R": 22, "H": hidden, "Q": hidden}
        check(fast("cpu"), Case(name=name, spec=spec, dtype=dtype, **sizes))


@pytest.mark.parametrize("steps", [3, 14])  # all weights are read where they stand; those with nothing between rows
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
@pytest.mark.parametrize("name", ["bentrevett", "luong", "conditional_gru", "fed output"])
def test_one_row_of_a_wide_decoder(name: str, cell: str, steps: int) -> None:
    check_one_wide_row(name, cell, steps)


@pytest.mark.parametrize("isa", VARIANTS)
def test_one_row_of_a_wide_decoder_on_other_processors(isa: str) -> None:
    choose(isa)
    check_one_wide_row("luong", "lstm", 14)


@pytest.mark.parametrize("where", [("keys",), ("queries",), ("keys", "queries")])
def test_scores_whose_exponentials_would_overflow(where: tuple[str, ...]) -> None:
    """Of a row of keys, of a query at some steps: they are computed another way."""
    spec = DecoderSpec(attend="before", context_to="first", readout=("state",))
    case = Case(name=str(where), spec=spec, dropout=False, mask="prefix", T=8)
    problem = Problem.draw(case)
    tensors = {n: t.clone() for n, t in problem.tensors.items()}
    if "keys" in where:
        tensors["keys"][1, :, 2] += 60
    if "queries" in where:
        tensors["w_query"][2] *= 200
    problem = replace(problem, tensors=tensors)
    problems = [problem, *(problem.near(seed) for seed in range(128))]  # 1 - t^2 near 1, times 200: a long tail
    pairs = [(run(plain, p), run(plain, p, torch.float64)) for p in problems]
    truth = pairs[0][1]
    before = torch.cat((tensors["h0.0"][:, None], truth["out"][:, :-1]), 1)
    most = (before @ tensors["w_query"].double().T).abs().amax(2)
    assert (most > 60).any() == ("queries" in where)  # e^120 is infinite, e^-120 is 0, their product NaN
    assert (most < 20).any()
    terms = Terms(case.I + case.H + case.A + case.S, 4 * case.H + case.A + case.D + case.S, case.N * case.T)
    compare(run(fast("cpu"), problem), truth, allow(truth, pairs, torch.float32, terms))


def fused_case(seed: int) -> Case:
    """A decoder with random options and sizes that is not refused."""
    for again in range(seed, seed + 100_000, 1000):
        case = any_case(again)
        if cpu.refuses(decoder_call(case)) is None:
            return case
    raise AssertionError("every decoder is refused")


@pytest.mark.parametrize("seed", range(500, 580))
def test_every_spec(seed: int) -> None:
    check(fast("cpu"), fused_case(seed))


@pytest.mark.parametrize(
    ("name", "cell"), [("cho", "lstm"), ("bahdanau", "gru_reset_before"), ("gnmt", "lstm"), ("joeynmt", "gru")]
)
def test_second_derivatives(name: str, cell: str) -> None:
    check_second(fast("cpu"), preset(name, cell, T=2))


def with_dtype(dtype: torch.dtype) -> DecoderCall:
    return lower(decoder_call(preset("bahdanau")), dtype, dtype)


def residual() -> DecoderCall:
    return decoder_call(preset("luong", num_layers=2, residual=1, query_layer=1))


REFUSED: dict[str, tuple[Callable[[], DecoderCall], str]] = {
    "fp64": (lambda: with_dtype(torch.float64), r"y is torch.float64; these kernels take float32 and bfloat16"),
    "fp16": (lambda: with_dtype(torch.float16), r"y is torch.float16"),
    "odd bf16": (lambda: with_dtype(torch.bfloat16), r"bfloat16 with odd I=7, A=19, D=13, R=17; .* in pairs"),
    "window": (lambda: decoder_call(preset("luong", window=2)), r"window=2: local-p attention is not fused"),
    "fed query": (
        lambda: decoder_call(preset("bahdanau", query="feed", feed="context", A=13)),
        r"query='feed' is not fused",
    ),
    "residual": (residual, r"residual=1 lies within the loop of 2 layers; only layers above"),
    "no combination": (
        lambda: decoder_call(preset("luong", combine=None, readout=("state",))),
        r"feed='output' with combine=None",
    ),
    "a part twice": (
        lambda: decoder_call(preset("luong", readout=("state", "context", "state"))),
        r"a part twice in readout=\('state', 'context', 'state'\)",
    ),
    "fixed context": (
        lambda: decoder_call(preset("cho", "gru", feed="output")),
        r"feed='output' beside a fixed context",
    ),
    "many layers": (lambda: decoder_call(preset("luong", num_layers=17)), r"num_layers=17 .* at most 16 layers loop"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    """By name it raises, under `auto` the reference runs; `explain` says why."""
    make, message = REFUSED[name]
    call = make()
    with pytest.raises(fastseq.InputError, match=rf"backend='cpu' cannot run this call: .*{message}"):
        decode(call, "cpu")
    explained = fastseq.explain(call)
    assert explained.chosen == "reference"
    assert explained[0].reason == cpu.refuses(call)
    assert explained[0].reason in str(explained)
    assert_close(decode(call), decode(call, "reference"), exactly=True)


def test_refused_on_another_device() -> None:
    call = decoder_call(preset("bahdanau"))
    moved = DecoderCall(
        call.spec, *mapped(lambda t: t.to("meta"), (call.y, call.keys, call.state, call.params, call.masks))
    )
    assert cpu.refuses(moved) == "y is on meta; these kernels run on the CPU"


def test_what_is_asked_is_what_runs() -> None:
    assert fastseq.explain(decoder_call(preset("luong"))).chosen == "cpu"


def leaves(call: DecoderCall) -> tuple[DecoderCall, list[Tensor]]:
    """The call of tensors that want gradients."""
    made: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        made.append(t.clone().requires_grad_())
        return made[-1]

    y, keys, state, params = mapped(leaf, (call.y, call.keys, call.state, call.params))
    return replace(call, y=y, keys=keys, state=state, params=params), made


def saved_shapes(call: DecoderCall) -> list[tuple[int, ...]]:
    """Of what backward keeps beside the call's own tensors."""
    call, given = leaves(call)
    own = {t.data_ptr() for t in (*given, *(m for m in (call.keys.mask, *call.masks) if m is not None))}
    kept: dict[int, tuple[int, ...]] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = tuple(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = decode(call, "cpu")
    assert output.output.requires_grad
    return sorted(kept.values())


def test_what_is_saved() -> None:
    """States, contexts, outputs, weights, gates, an LSTM's cell states, queries: nothing of T * S * A."""
    case = preset("luong", "lstm", dropout=False)
    N, T, H = case.N, case.T, case.H
    contexts, weights, queries = ((N, T, size) for size in (case.D, case.S, case.A))
    outs = (N, T + 1, case.R)
    expected = [(1, N, T + 1, H), contexts, outs, weights, queries, (1, N, T, 4, H), (1, N, T, H)]
    assert saved_shapes(decoder_call(case)) == sorted(expected)
    gru = replace(case, spec=replace(case.spec, cell="gru"))
    assert saved_shapes(decoder_call(gru)) == sorted(expected[:-1])
    dot = replace(gru, score="dot")
    assert saved_shapes(decoder_call(dot)) == sorted([*expected[:4], expected[5]])


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_is_saved_without_gradients(name: str) -> None:
    call = decoder_call(preset(name, "gru"))

    def never(t: Tensor) -> Tensor:
        raise AssertionError(f"a tensor of shape {tuple(t.shape)} is saved")

    with torch.autograd.graph.saved_tensors_hooks(never, never):
        plain = decode(call, "cpu")
        with torch.no_grad():
            silent = decode(leaves(call)[0], "cpu")
    assert not plain.output.requires_grad
    assert_close(silent, plain, exactly=True)


@pytest.mark.parametrize("name", PRESETS)
def test_each_input_alone(name: str) -> None:
    """The gradient of any one input has the bits that it has among all others."""
    problem = Problem.draw(preset(name, "gru"))
    full = run(fast("cpu"), problem)
    for wanted in problem.tensors:
        tensors = {n: t.clone().requires_grad_(n == wanted) for n, t in problem.tensors.items()}
        outputs = {n: o for n, o in fast("cpu")(problem, tensors).items() if o.requires_grad}
        (found,) = torch.autograd.grad(
            list(outputs.values()), [tensors[wanted]], [problem.grads[n] for n in outputs], materialize_grads=True
        )
        assert torch.equal(found, full[f"d_{wanted}"]), wanted


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_gradients_are_whole(name: str) -> None:
    """No parameter is cut or joined on its way to a kernel: its gradient is made in one piece."""
    call, _ = leaves(decoder_call(preset(name, "lstm", bias=True)))
    owners: dict[int, set[str]] = {}
    nodes, seen = [decode(call, "cpu").output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        for following, _ in node.next_functions:
            if hasattr(following, "variable"):
                owners.setdefault(following.variable.data_ptr(), set()).add(node.name())
            elif following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    parameters: list[Tensor] = []
    mapped(parameters.append, call.params)
    for parameter in parameters:
        (owner,) = owners[parameter.data_ptr()]
        assert owner in ("_DecoderLoopBackward", "_RnnLayerBackward", "_LinearBackward")


@pytest.mark.parametrize("name", PRESETS)
def test_no_rows(name: str) -> None:
    call = decoder_call(preset(name, "gru"))
    none = replace(
        call, y=call.y[:0], keys=mapped(lambda t: t[:0], call.keys), state=mapped(lambda t: t[:0], call.state),
        masks=call.masks._replace(**{
            n: m[:, :0] if n == "layers" else m[:0] for n, m in call.masks._asdict().items() if m is not None
        }),
    )  # fmt: skip
    none, inputs = leaves(none)
    got, expected = decode(none, "cpu"), decode(none, "reference")
    assert_close(got, expected, exactly=True)
    grads = torch.autograd.grad(got.output.sum(), inputs, materialize_grads=True)
    assert all(not d.count_nonzero() for d in grads)


def test_gradients_of_masks_and_transforms_take_the_reference() -> None:
    call = decoder_call(preset("luong"))
    mask = call.masks.output.clone().requires_grad_()
    masked = replace(call, masks=call.masks._replace(output=mask))
    got, expected = (torch.autograd.grad(decode(masked, b).output.sum(), mask)[0] for b in ("cpu", "reference"))
    assert torch.equal(got, expected)
    with forward_ad.dual_level():
        dual = replace(call, y=forward_ad.make_dual(call.y, torch.ones_like(call.y)))
        tangents = [forward_ad.unpack_dual(decode(dual, b).output).tangent for b in ("cpu", "reference")]
    assert torch.equal(*tangents)


# The operator.


def arguments(case: Case) -> tuple[ops.LoopSpec, ops.LoopTensors]:
    call = decoder_call(case)
    plan = fused.plan(call.spec)
    return plan.loop, fused.loop_tensors(call, plan, call.y)


no_alias = pytest.mark.filterwarnings("error:.*may not alias")
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
LOOPS = [
    preset("luong", "lstm", num_layers=2, mask="none"),
    preset("luong", "gru", combine="maxout", readout=("prev_state", "context", "input"), mask="none"),
    preset("bahdanau", "gru_reset_before", score="dot", dropout=False, mask="none"),
    preset("conditional_gru", "lstm", dtype=torch.bfloat16, state=torch.float32, mask="none", **EVEN),
    preset("cho", "gru"),
]
loops = pytest.mark.parametrize("case", LOOPS, ids=str)


def steps_of(loop: ops.LoopSpec, what: str, t: Tensor) -> Tensor:
    """Without the initial value that precedes what is fed back."""
    return t[:, 1:] if t.numel() and loop.feed == what else t


@no_alias
@loops
@pytest.mark.parametrize("save", [False, True])
def test_opcheck_forward(case: Case, save: bool) -> None:
    """Schema, fake kernel and tracing agree with what the operator does."""
    loop, x = arguments(case)
    torch.library.opcheck(torch.ops.fastseq.decoder_loop.default, (*loop, *x, True, save), test_utils=CHECKS)


@no_alias
@loops
@pytest.mark.parametrize("all_needed", [True, False])
def test_opcheck_backward(case: Case, all_needed: bool) -> None:
    loop, x = arguments(case)
    made = torch.ops.fastseq.decoder_loop(*loop, *x, True, True)
    kept, states = made[: len(ops.KEPT)], made[len(ops.KEPT) + 1 :]
    hs, contexts, outs, weights, *_ = kept
    shown = [steps_of(loop, "context", contexts), steps_of(loop, "output", outs), weights]
    shown = [t if t.numel() else None for t in shown]
    grads = (torch.ones_like(hs[-1, :, 1:]), *shown, None, states[: loop.layers], states[loop.layers :])
    constant = [id(t) for t in (x.mask, x.layer_masks, x.read_mask, x.out_mask)]
    needs = [id(t) not in constant and (all_needed or t is x.weights[0]) for t in x.flat()]
    inputs = (*loop, *grads, *x, kept, needs)
    torch.library.opcheck(torch.ops.fastseq.decoder_loop_backward.default, inputs, test_utils=CHECKS)


@loops
def test_the_operator_is_the_kernel(case: Case) -> None:
    """Called through the dispatcher it gives the bits of the direct call; without `save` it keeps less."""
    loop, x = arguments(case)
    direct = ops.decoder_loop(loop, x, True)
    for save in (False, True):
        hs, contexts, outs, weights, gates, cs, queries, read_saved, feed_n, *states = torch.ops.fastseq.decoder_loop(
            *loop, *x, True, save
        )
        seen = steps_of(loop, "output", outs) if loop.feed == "output" else steps_of(loop, "context", contexts)
        through = (hs[-1, :, 1:], seen, weights, feed_n, *states)
        for a, b in zip((*direct[:4], *direct.h_n, *direct.c_n), through, strict=True):
            assert b.numel() == 0 if a is None else torch.equal(a, b)
        assert any(t.numel() for t in (gates, cs, queries, read_saved)) == save


@loops
def test_the_reference_loop_is_the_loop(case: Case) -> None:
    """What second derivatives are taken of computes what the kernels compute."""
    loop, x = arguments(case)
    direct = ops.decoder_loop(loop, x, True)
    plain = ops.loop_reference(loop, True, *x.flat())
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if case.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for a, b in zip((*direct[:4], *direct.h_n, *direct.c_n), plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    """torch.compile, with nothing left for the next test."""
    torch.compiler.reset()
    yield lambda function, **options: torch.compile(function, fullgraph=True, **options)
    torch.compiler.reset()


def flat_results(call: DecoderCall, function: Callable[[DecoderCall], DecoderOutput]) -> list[Tensor]:
    """Outputs and gradients."""
    call, inputs = leaves(call)
    outputs: list[Tensor] = []
    mapped(outputs.append, function(call))
    loss = sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in outputs)
    return [*(o.detach() for o in outputs), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("name", ["luong", "bahdanau", "gnmt", "cho"])
def test_compiled_for_any_batch(name: str, compiled: Callable[..., Any]) -> None:
    """One dynamic graph without breaks serves batches of several sizes, forward and backward."""
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = compiled(lambda call: decode(call, "cpu"), dynamic=True, backend=graphs)
    counts = []
    for rows in (4, 6, 8):
        case = preset(name, "lstm", N=rows, B=rows, T=2, mask="none")
        one = decoder_call(case)
        for a, b in zip(flat_results(one, call), flat_results(one, lambda c: decode(c, "cpu")), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        counts.append(graphs.frame_count)
    assert counts[0] == counts[-1]


def test_compiled_inference(compiled: Callable[..., Any]) -> None:
    call = decoder_call(preset("luong"))
    with torch.no_grad():
        assert_close(compiled(decode, backend="aot_eager")(call, "cpu"), decode(call, "cpu"), exactly=True)


def test_compiled_by_inductor(compiled: Callable[..., Any]) -> None:
    call = decoder_call(preset("gnmt", T=2, mask="none"))
    got = flat_results(call, compiled(lambda c: decode(c, "cpu")))
    for a, b in zip(got, flat_results(call, lambda c: decode(c, "cpu")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

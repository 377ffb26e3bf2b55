"""torch.compile, torch.export, torch.jit and quantization: what they make of a module computes what the module does."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.export import Dim, export

import fastseq
from tests.modes.cases import Case, H, Holder, I, assert_same, flatten, results
from tests.modes.modes import (
    COMPILE,
    COMPILE_ROWS,
    COMPILE_STEPS,
    EXPORT,
    EXPORT_STEPS,
    QUANTIZE,
    SCRIPT,
    TRACE_ROWS,
    TRACE_STEPS,
)

SIZES = ((4, 3), (2, 5), (7, 2), (1, 1))  # T and B; torch.export is shown the first
quiet = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*deprecated:DeprecationWarning", "ignore:.*torch.ao.quantization is deprecated",
    "ignore::torch.jit.TracerWarning",
)  # fmt: skip


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Compiled code of one test is not met by the next."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@COMPILE
def test_compiled(case: Case) -> None:
    """One graph; outputs and every gradient, of a model that has the module within."""
    model = Holder(case.fast(bidirectional=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, case.input(steps=2)), results(model, case.input(steps=2)))


def test_compiled_without_gradients_by_the_torch_backend() -> None:
    """What it refuses with gradients."""
    module, x = fastseq.LSTM(I, H, backend="torch"), torch.randn(4, 3, I)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(x), module(x))


def graphs(case: Case, sizes: list[tuple[int, int]]) -> list[int]:
    """How many graphs there are after each call; results are those of the module."""
    module = Holder(case.fast())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, made = torch.compile(module, fullgraph=True, dynamic=True, backend=counter), []
    for steps, rows in sizes:
        x = case.input(steps, rows)
        assert_same(results(compiled, x, list(module.parameters())), results(module, x))
        made.append(counter.frame_count)
    return made


@COMPILE_ROWS
def test_compiled_for_any_rows(case: Case) -> None:
    made = graphs(case, [(2, 3), (2, 5)])
    assert made[0] == made[-1]


@COMPILE_STEPS
def test_compiled_for_any_steps(case: Case) -> None:
    """Where steps are unrolled, a new T is a new graph."""
    first, last = graphs(case, [(2, 3), (3, 4)])
    assert last == (first if COMPILE_STEPS.limit(case) is None else first + 1)


def exported(case: Case, strict: bool, steps: bool) -> None:
    """Export in inference; another batch, and with `steps` another time, through the exported program."""
    module = Holder(case.fast(bidirectional=True, batch_first=True)).eval()
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if steps and case.layer else {0: Dim.DYNAMIC}
    rows_first = [x.transpose(0, 1) if case.layer else x for x in (case.input(*size) for size in SIZES)]
    with torch.no_grad():
        program = export(module, (rows_first[0],), dynamic_shapes=(dynamic,), strict=strict)
        for x in rows_first if steps else (case.input(4, b).transpose(0, -2) for _, b in SIZES):
            assert_same(program.module()(x), module(x))


@EXPORT
def test_export(case: Case) -> None:
    exported(case, False, steps=False)


@EXPORT_STEPS
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_any_steps(case: Case, strict: bool) -> None:
    exported(case, strict, steps=True)


def test_an_exported_program_cannot_be_trained() -> None:
    """It holds the operator alone: its gradient would be None, and PyTorch would only warn."""
    module, x = fastseq.GRU(I, H), torch.randn(4, 3, I)
    program = export(module, (x,))
    with pytest.raises(fastseq.InputError, match="without their gradients and cannot be trained; train the module"):
        program.module()(x)[0].sum().backward()


def test_export_with_lengths() -> None:
    """Lengths are an input of the program, of rows as of steps."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = fastseq.GRU(I, H, bidirectional=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            return self.rnn(x, lengths=lengths)

    model = Model().eval()
    dynamic = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    with torch.no_grad():
        program = export(model, (torch.randn(4, 3, I), torch.tensor([4, 0, 2])), dynamic_shapes=dynamic)
        for lengths in ([6, 1], [3, 0, 5, 2]):
            given = torch.randn(6, len(lengths), I), torch.tensor(lengths)
            assert_same(program.module()(*given), model(*given))


@quiet
@SCRIPT
def test_scripted(case: Case) -> None:
    """torch's own module stands in the script, on the same parameters: results, gradients, and later changes."""
    model = Holder(case.fast(num_layers=2, bidirectional=True))
    parameters, expected = list(model.parameters()), results(model, case.input())
    script = torch.jit.script(model)
    assert script.rnn.original_name == case.kind
    assert [p.data_ptr() for p in script.parameters()] == [p.data_ptr() for p in parameters]
    assert_same(results(script, case.input()), expected)
    with torch.no_grad():
        for p in parameters:
            p.mul_(2)
    model.rnn = case.fast(num_layers=2, bidirectional=True)
    model.rnn.load_state_dict({n: p.detach() for n, p in script.rnn.named_parameters()})
    assert_same(flatten(script(case.input())), flatten(model(case.input())))


@quiet
def test_scripting_exchanges_modules_in_the_python_model_too() -> None:
    """torch.jit.script does so with whatever `__prepare_scriptable__` returns; accelerate makes it fast again."""
    model = Holder(fastseq.LSTM(I, H))
    parameters = [id(p) for p in model.parameters()]
    torch.jit.script(model)
    assert type(model.rnn) is nn.LSTM
    assert [c.action for c in fastseq.accelerate(model)] == ["accelerated"]
    assert type(model.rnn) is fastseq.LSTM
    assert [id(p) for p in model.parameters()] == parameters


class Own(fastseq.GRU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[0]


class Plain(fastseq.GRU):
    """A subclass that computes what its base does."""


@quiet
def test_what_cannot_be_scripted() -> None:
    normed = torch.nn.utils.parametrizations.weight_norm(fastseq.GRU(I, H), "weight_hh_l0")
    encoder = fastseq.Encoder(I, H, cell="gru_reset_before")
    for module, message in (
        (Own(I, H), "Own has a forward of its own"),
        (fastseq.GRU(I, H, zoneout=0.2), r"takes torch.nn.GRU, which has no zoneout=0.2; use torch.compile"),
        (normed, "no parametrized GRU; call torch.nn.utils.parametrize.remove_parametrizations first"),
        (encoder.layers[0], "ResetBefore has a forward of its own"),
        (encoder, "fastseq.Encoder has no form for torch.jit.script; use torch.compile or torch.export"),
        (fastseq.Decoder.luong(I, H, memory_size=H), "fastseq.Decoder has no form"),
        (fastseq.Attention(I, H), "fastseq.Attention has no form"),
    ):
        with pytest.raises(fastseq.InputError, match=message):
            torch.jit.script(Holder(module))
    assert torch.jit.script(Holder(Plain(I, H))).rnn.original_name == "GRU"


class WithLengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fastseq.LSTM(I, H)

    def forward(self, x: Tensor, lengths: Tensor):
        return self.rnn(x, lengths=lengths)


@quiet
def test_a_script_has_no_lengths() -> None:
    """TorchScript names what torch's module does not take."""
    with pytest.raises(RuntimeError, match="Keyword argument lengths unknown"):
        torch.jit.script(WithLengths())


@quiet
def test_accelerate_leaves_scripts_and_says_so() -> None:
    stock = Holder(nn.LSTM(I, H))
    x = torch.randn(4, 3, I)
    for script in (torch.jit.script(stock), torch.jit.trace(stock, x)):
        before = flatten(script(x))
        (change,) = fastseq.accelerate(script)
        assert change[:2] == ("rnn", "skipped")
        assert "torch.jit compiled; accelerate the Python model" in change.reason
        assert_same(flatten(script(x)), before, 0)


def traced(case: Case, sizes: list[tuple[int, int]]) -> None:
    module = Holder(case.fast(bidirectional=True)).eval()
    trace = torch.jit.trace(module, (case.input(),))
    for steps, rows in sizes:
        x = case.input(steps, rows)
        assert_same(flatten(trace(x)), flatten(module(x)))


@quiet
@TRACE_ROWS
def test_trace(case: Case) -> None:
    traced(case, [(4, b) for _, b in SIZES])


@quiet
@TRACE_STEPS
def test_trace_of_any_steps(case: Case) -> None:
    traced(case, list(SIZES))


def quantized(model: nn.Module) -> nn.Module:
    return quantize_dynamic(model, {nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell})


@quiet
@QUANTIZE
def test_quantize_dynamic(case: Case) -> None:
    """Layers built as fastseq's and accelerated ones become torch's first; then the results are torch's to the bit."""
    stock, fast = (Holder(m).eval() for m in case.twins(bidirectional=True))
    accelerated = copy.deepcopy(stock)
    fastseq.accelerate(accelerated)
    expected = quantized(stock)
    assert ("quantized" in type(expected.rnn).__module__) == (QUANTIZE.limit(case) is None)
    for model, undo in ((accelerated, True), (fast, "all")):
        report = fastseq.accelerate(model, undo=undo)
        assert [c.action for c in report] == ["reverted"]
        assert f"is torch.nn.{case.kind}" in report[0].reason
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*fastseq")
            made = quantized(model)
        assert type(made.rnn) is type(expected.rnn)
        assert_same(flatten(made(case.input())), flatten(expected(case.input())), 0)


@quiet
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_quantization_without_undo_says_what_it_leaves(kind: str) -> None:
    model = nn.Sequential(getattr(nn, kind)(I, H))
    fastseq.accelerate(model)
    with pytest.warns(UserWarning, match=rf"leaves fastseq\.{kind} in floating point; call fastseq.accelerate"):
        made = quantized(model)
    assert type(made[0]) is getattr(fastseq, kind)
    assert not hasattr(made[0], "qconfig")  # torch takes it away again
    (change,) = fastseq.accelerate(quantized(nn.Sequential(getattr(nn, kind)(I, H))))
    assert change.action == "skipped"
    assert f".{kind}, made to be quantized" in change.reason
    assert change.reason.endswith("; accelerated before, the layer stays in floating point")

"""torch.onnx.export: ONNX's own nodes, whichever the backend, run by ONNX Runtime on sizes the export never saw."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq
from tests.modes.cases import Case, H, Holder, I, assert_same, flatten
from tests.modes.modes import ONNX, ONNX_TRACED

pytest.importorskip("numpy", reason="needs numpy")
onnx = pytest.importorskip("onnx", reason="needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnxscript")
if not hasattr(torch.onnx, "ops"):
    pytest.skip("needs torch.onnx.ops, of torch 2.8", allow_module_level=True)

SIZES = ((4, 3), (7, 2), (1, 1), (2, 9))  # T and B; the export is shown the first
NODES = {"LSTM": "LSTM", "GRU": "GRU", "RNN": "RNN"}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def export(model: nn.Module, inputs: tuple[Tensor, ...], *dynamic: dict[int, str]) -> Any:
    """The ONNX model by torch.export."""
    names = [f"in{k}" for k in range(len(inputs))]
    program = torch.onnx.export(
        model, inputs, dynamo=True, input_names=names, dynamic_shapes=dynamic, verbose=False, external_data=False
    )
    assert program is not None
    return program.model_proto


def export_traced(model: nn.Module, inputs: tuple[Tensor, ...], *dynamic: dict[int, str]) -> Any:
    """The same by torch.jit.trace."""
    file = io.BytesIO()
    names = [f"in{k}" for k in range(len(inputs))]
    axes = dict(zip(names, dynamic, strict=True))
    torch.onnx.export(model, inputs, file, dynamo=False, input_names=names, dynamic_axes=axes)
    return onnx.load_from_string(file.getvalue())


def run(proto: Any, *inputs: Tensor) -> list[Tensor]:
    """By ONNX Runtime."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(t) for t in session.run(None, {f"in{k}": t.numpy() for k, t in enumerate(inputs)})]


def standard(proto: Any) -> set[str]:
    """The operators of the graph, all of them ONNX's own."""
    onnx.checker.check_model(proto)
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    return {node.op_type for node in proto.graph.node}


def check(case: Case, exporter: Any, layers: int) -> None:
    """Results within four times the usual bound: ONNX Runtime's sigmoid and tanh are approximations of another kind."""
    module = case.fast(num_layers=layers, bidirectional=True).eval()
    dynamic = {0: "T", 1: "B"} if case.layer else {0: "B"}
    proto = exporter(Holder(module), (case.input(*SIZES[0]),), dynamic)
    nodes = standard(proto)
    if case.layer:
        assert NODES[case.kind] in nodes
        assert not nodes & {"Loop", "Scan", "MatMul", "Gemm"}  # that node does all the work
    for size in SIZES:
        assert_same(run(proto, case.input(*size)), flatten(module(case.input(*size))), 128)


@ONNX
def test_onnx(case: Case) -> None:
    check(case, export, 1)  # an encoder below has two


@ONNX_TRACED
def test_onnx_by_tracing(case: Case) -> None:
    check(case, export_traced, 2)


@pytest.mark.parametrize("exporter", [export, export_traced])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_the_bare_module_with_other_options(kind: str, exporter: Any) -> None:
    """No bias, batch first; and no model around it: torch.onnx passes every default of forward by position."""
    module = getattr(fastseq, kind)(I, H, bias=False, batch_first=True).eval()
    x = torch.randn(3, 4, I)
    proto = exporter(module, (x,), {0: "B", 1: "T"})
    for given in (x, torch.randn(2, 7, I)):
        assert_same(run(proto, given), flatten(module(given)), 128)


class WithState(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = getattr(fastseq, kind)(I, H, bidirectional=True)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.rnn(x, (h, c) if isinstance(self.rnn, nn.LSTM) else h + 0 * c)


@pytest.mark.parametrize("exporter", [export, export_traced])
def test_relu(exporter: Any) -> None:
    """The activations of both directions."""
    module = fastseq.RNN(I, H, nonlinearity="relu", bidirectional=True).eval()
    proto = exporter(Holder(module), (torch.randn(4, 3, I),), {0: "T", 1: "B"})
    assert "RNN" in standard(proto)
    given = torch.randn(2, 5, I)
    assert_same(run(proto, given), flatten(module(given)), 128)


@pytest.mark.parametrize("exporter", [export, export_traced])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_initial_states(kind: str, exporter: Any) -> None:
    model = WithState(kind).eval()
    given = torch.randn(4, 3, I), torch.randn(2, 3, H), torch.randn(2, 3, H)
    proto = exporter(model, given, {0: "T", 1: "B"}, {1: "B"}, {1: "B"})
    for t, b in SIZES:
        given = torch.randn(t, b, I), torch.randn(2, b, H), torch.randn(2, b, H)
        assert_same(run(proto, *given), flatten(model(*given)), 128)


class WithLengths(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        out = self.rnn(x, lengths=lengths)
        return out.out if isinstance(out, fastseq.Memory) else out


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_learned_state(kind: str) -> None:
    """It is the node's initial state, for as many rows as there are."""
    module = getattr(fastseq, kind)(I, H, bidirectional=True, learn_state=True).eval()
    for name, p in module.named_parameters():
        if name.startswith("initial"):
            nn.init.normal_(p)
    proto = export(module, (torch.randn(4, 3, I),), {0: "T", 1: "B"})
    given = torch.randn(2, 7, I)
    assert_same(run(proto, given), flatten(module(given)), 128)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_lengths(kind: str) -> None:
    """ONNX's nodes take them: the output is 0 behind them, and states are each row's last."""
    model = WithLengths(getattr(fastseq, kind)(I, H, bidirectional=True)).eval()
    proto = export(model, (torch.randn(6, 3, I), torch.tensor([6, 2, 1])), {0: "T", 1: "B"}, {0: "B"})
    standard(proto)
    for lengths in ([6, 2, 1], [1, 5], [2, 5, 4, 3]):
        given = torch.randn(6 if 6 in lengths else 5, len(lengths), I), torch.tensor(lengths)
        assert_same(run(proto, *given), flatten(model(*given)), 128)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_rows_of_no_length(kind: str) -> None:
    """They keep their first state, of which ONNX's nodes would make 0."""
    module = getattr(fastseq, kind)(I, H, bidirectional=True, learn_state=True).eval()
    for name, p in module.named_parameters():
        if name.startswith("initial"):
            nn.init.normal_(p)
    model = WithLengths(module)
    proto = export(model, (torch.randn(6, 3, I), torch.tensor([6, 2, 1])), {0: "T", 1: "B"}, {0: "B"})
    given = torch.randn(5, 4, I), torch.tensor([0, 5, 0, 2])
    assert_same(run(proto, *given), flatten(model(*given)), 128)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_an_encoder(cell: str) -> None:
    """Embedding, two layers and lengths; the GRU of Cho et al. 2014 has a node too."""
    encoder = fastseq.Encoder(I, H, 2, cell=cell, bidirectional=True, embedding=nn.Embedding(11, I)).eval()
    model = WithLengths(encoder)
    dynamic = {0: "B", 1: "S"}, {0: "B"}
    proto = export(model, (torch.randint(11, (3, 6)), torch.tensor([6, 2, 1])), *dynamic)
    assert ("LSTM" if cell == "lstm" else "GRU") in standard(proto)
    given = torch.randint(11, (4, 5)), torch.tensor([1, 5, 2, 3])
    assert_same(run(proto, *given), flatten(model(*given)), 128)


class Resets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fastseq.GRU(I, H)

    def forward(self, x: Tensor, resets: Tensor) -> Any:
        return self.rnn(x, resets=resets)


def test_what_has_no_node_is_refused() -> None:
    x = torch.randn(4, 3, I)
    rows = {0: "T", 1: "B"}
    projected = Holder(fastseq.LSTM(I, H, proj_size=3))
    for model, given, message in (
        (Resets(), (x, torch.zeros(4, 3, dtype=torch.bool)), "InputError'>: ONNX's GRU has no resets="),
        (
            Holder(fastseq.LSTM(I, H, zoneout=0.1)),
            (x,),
            r"InputError'>: ONNX's LSTM has no zoneout \(h 0.1, c 0.1\), which stays in evaluation",
        ),
        (projected, (x,), "InputError'>: ONNX's LSTM has no projection, proj_size=3"),
    ):
        with pytest.raises(torch.onnx.errors.OnnxExporterError, match=message):
            export(model.eval(), given, *[rows] * len(given))
    with pytest.raises(fastseq.InputError, match=r"torch.onnx.export\(dynamo=False\), use dynamo=True, records no len"):
        export_traced(WithLengths(fastseq.GRU(I, H)).eval(), (x, torch.tensor([4, 1, 2])), rows, {0: "B"})

"""One layer against ONNX Runtime's LSTM and GRU, an implementation that shares nothing with torch: random sizes."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops.rnn import rnn_layer
from tests.oracle import EPS, Case, Layer, Mismatch, Problem, Results, budget, compare, largest

pytest.importorskip("numpy", reason="needs numpy")
onnx = pytest.importorskip("onnx", reason="needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

OPTIONS = list(itertools.product((False, True), ("full", "lengths"), (False, True), (False, True)))
ORDER = {"lstm": [0, 3, 1, 2], "gru": [1, 0, 2]}  # ONNX's gates i, o, f, c and z, r, h in torch's numbering


def reordered(cell: str, w: Tensor) -> Tensor:
    """Rows of a weight or bias in ONNX's gate order."""
    gates = w.unflatten(0, (len(ORDER[cell]), -1))
    return gates[ORDER[cell]].flatten(0, 1)


def onnx_layer(problem: Problem) -> Results:
    """The outputs of a model of one ONNX node; its defaults are torch's functions, but for linear_before_reset."""
    case, dirs = problem.case, 2 if problem.case.bidirectional else 1
    state = ["h0", "c0"] if case.cell == "lstm" else ["h0"]
    feeds = {"X": problem.tensors["x"]}
    for name, parts in (("W", ["w_ih"]), ("R", ["w_hh"]), ("B", ["b_ih", "b_hh"])):
        if f"{parts[0]}.0" in problem.tensors:
            each = [[reordered(case.cell, problem.tensors[f"{p}.{d}"]) for p in parts] for d in range(dirs)]
            feeds[name] = torch.stack([torch.cat(e) for e in each])
    if problem.lengths is not None:
        feeds["lengths"] = problem.lengths.int()
    feeds |= {n: problem.tensors[n] for n in state if n in problem.tensors}
    slots = ["X", "W", "R", "B", "lengths", *state]
    outputs = ["Y", *(n[0] + "_n" for n in state)]
    options = {} if case.cell == "lstm" else {"linear_before_reset": 1}
    node = onnx.helper.make_node(
        case.cell.upper(), [n if n in feeds else "" for n in slots], outputs, hidden_size=case.H,
        direction="bidirectional" if dirs == 2 else "forward", **options,
    )  # fmt: skip
    kinds = {torch.float32: onnx.TensorProto.FLOAT, torch.int32: onnx.TensorProto.INT32}
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "layer", [info(n, kinds[t.dtype], list(t.shape)) for n, t in feeds.items()],
        [info(n, onnx.TensorProto.FLOAT, None) for n in outputs],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    y, *finals = session.run(None, {n: t.numpy() for n, t in feeds.items()})
    out = torch.from_numpy(y).transpose(1, 2).flatten(2)  # [T, D, B, H] -> [T, B, D * H]
    return {"out": out} | {n: torch.from_numpy(f) for n, f in zip(outputs[1:], finals, strict=True)}


def random_case(cell: str, seed: int) -> Case:
    r = random.Random(seed)
    shape = (r.randint(1, 30), r.randint(1, 20), r.randint(1, 70), r.randint(4, 90))
    two, rows, hx, bias = OPTIONS[seed % len(OPTIONS)]
    return Case(cell, torch.float32, *shape, bidirectional=two, rows=rows, hx=hx, bias=bias, threads=r.choice((1, 2)))


def check_against_onnxruntime(layer: Layer, case: Case, seed: int) -> None:
    """`layer` no further from ONNX Runtime than both may be from the truth; and ONNX Runtime close to that itself."""
    problem = Problem.draw(case, seed)
    if problem.lengths is not None:
        problem.lengths.clamp_(min=1)  # ONNX Runtime has no rows of length 0
        problem.tensors["x"].nan_to_num_()  # and reads what stands behind a row's end
    theirs = onnx_layer(problem)
    truth, allowed = budget(problem)
    for name, t in theirs.items():
        error = largest(t - truth[name])
        if not (error <= 200 * EPS * largest(truth[name])):  # its tanh and sigmoid are rational approximations
            raise Mismatch(f"ONNX Runtime's own {name} errs by {error:.3g}")
        allowed[name] += error
    torch.set_num_threads(case.threads)
    with torch.no_grad():
        compare(problem.call(layer, problem.tensors), {n: t.double() for n, t in theirs.items()}, allowed)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("seed", range(32))
def test_forward(cell: str, seed: int) -> None:
    """Lengths, both directions, initial states, biases: all combinations, with random sizes."""
    check_against_onnxruntime(rnn_layer, random_case(cell, seed), seed)

"""The peer ONNX Runtime: one LSTM, GRU or RNN node built from the weights, in ONNX's gate order.

Threads spin while a run needs them, as by default, but stop at its end: the next contender needs the core.
Input and output are bound once, which spares it `run`'s dictionaries.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from .cases import LayerCase
from .problem import LayerProblem
from .programs import Program

__all__ = ["onnx_program", "refuses", "unavailable"]

# torch's i f g o -> ONNX's i o f c; r z n -> z r h
ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}
OPSET, IR_VERSION = 17, 8


def unavailable() -> str | None:
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    return f"not installed; run: pip install {' '.join(missing)}" if missing else None


def refuses(case: LayerCase) -> str | None:
    if case.mode == "train":
        return "forward only"
    if case.is_cell or case.rows == "packed" or case.layers > 1 or case.dtype != "float32":
        return "one float32 layer of padded rows only"
    return None


def onnx_program(problem: LayerProblem) -> Program:
    """A session with torch.get_num_threads() threads."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(_model(problem), options, providers=["CPUExecutionProvider"])
    inputs = _inputs(problem)
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_cpu_input(name, value.numpy())
    names = [output.name for output in session.get_outputs()]
    for name in names:
        binding.bind_output(name, "cpu")

    def step() -> None:
        session.run_with_iobinding(binding)

    def results() -> dict[str, Tensor]:
        step()
        return {f"out{k}": torch.from_numpy(value) for k, value in enumerate(binding.copy_outputs_to_cpu())}

    return Program(step, results, grad=False, backend="onnxruntime")


def _inputs(problem: LayerProblem) -> dict[str, Tensor]:
    """The tensors of a run, by the names in the graph."""
    inputs = {"x": problem.x}
    if problem.case.rows == "lengths" and problem.lengths is not None:
        inputs["lengths"] = problem.lengths.int()
    return inputs | dict(zip(("h0", "c0"), problem.hx, strict=False))


def _model(problem: LayerProblem) -> bytes:
    """x [T, B, I] -> out [T, B, D*H], h_n, (c_n) [D, B, H]: the node, and what it takes to have torch's layout."""
    from onnx import TensorProto, helper, numpy_helper

    case, inputs = problem.case, _inputs(problem)
    states = ["h_n", "c_n"] if case.cell == "lstm" else ["h_n"]
    optional = [name if name in inputs else "" for name in ("lengths", "h0", "c0")[: 1 + len(states)]]
    attributes: dict[str, Any] = {
        "hidden_size": case.H,
        "direction": "bidirectional" if case.bidirectional else "forward",
    }
    if case.cell == "gru":
        attributes["linear_before_reset"] = 1  # torch's GRU
    name, _, act = case.cell.upper().partition("_")
    if act:
        attributes["activations"] = [act.capitalize()] * (2 if case.bidirectional else 1)
    nodes = [
        helper.make_node(name, ["x", "W", "R", "bias", *optional], ["y", *states], **attributes),
        helper.make_node("Transpose", ["y"], ["rows_first"], perm=[0, 2, 1, 3]),  # [T, D, B, H] -> [T, B, D, H]
        helper.make_node("Reshape", ["rows_first", "shape"], ["out"]),
    ]
    constants = _weights(problem) | {"shape": torch.tensor([0, 0, -1])}
    types = {torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32}
    graph = helper.make_graph(
        nodes,
        case.cell,
        [helper.make_tensor_value_info(name, types[t.dtype], list(t.shape)) for name, t in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("out", *states)],
        [numpy_helper.from_array(t.numpy(), name) for name, t in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return bytes(model.SerializeToString())


def _weights(problem: LayerProblem) -> dict[str, Tensor]:
    """W [D, G*H, I], R [D, G*H, H], bias [D, 2*G*H]."""
    order = ORDER[problem.case.cell]

    def reordered(name: str) -> Tensor:
        gates = problem.weights[name].chunk(len(order))
        return torch.cat([gates[k] for k in order])

    ends = ("_l0", "_l0_reverse") if problem.case.bidirectional else ("_l0",)
    return {
        "W": torch.stack([reordered(f"weight_ih{end}") for end in ends]),
        "R": torch.stack([reordered(f"weight_hh{end}") for end in ends]),
        "bias": torch.stack([torch.cat([reordered(f"bias_ih{end}"), reordered(f"bias_hh{end}")]) for end in ends]),
    }

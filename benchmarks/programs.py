"""A case made ready to run: what every program is, and those of layers, which have torch.nn's interface."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq.cuda import devices
from fastseq.cuda.native import kind_of
from fastseq.cuda.plan import one_step, plan
from fastseq.explain import Explanation
from fastseq.ops.rnn_gpu import tf32_flag

from .cases import LayerCase
from .cudnn import algorithm, onednn
from .problem import LayerProblem, flatten, module_of

__all__ = [
    "NotRunnable",
    "Program",
    "Results",
    "chosen_backend",
    "compile_refuses",
    "compiled",
    "compiled_program",
    "fastseq_program",
    "frozen_program",
    "frozen_refuses",
    "lengths_call",
    "module_program",
    "predicted",
    "program_of",
    "torch_program",
    "us_a_step",
]

Results = dict[str, Tensor]  # out0, out1, ...; d_x, d_h0, ..., d_<parameter>


class NotRunnable(Exception):
    """This contender cannot be made ready for the case; the message says why."""


@dataclass(frozen=True)
class Program:
    """One contender's form of a case."""

    step: Callable[[], Any]  # what is timed, run with gradients on or off as `grad` says
    results: Callable[[], Results]  # the same computation, its outcome by name
    grad: bool
    backend: str  # which implementation runs
    note: str = ""
    first: float = 0.0  # seconds of the first call, compilations included, where that was timed


def program_of(
    forward: Callable[[], list[Tensor]],
    leaves: Mapping[str, Tensor],  # what training wants the gradients of
    grads: Sequence[Tensor],  # sent back to the first outputs
    train: bool,
    backend: str,
) -> Program:
    """`forward`, and in training the gradients of its outputs."""

    def backward(outputs: list[Tensor]) -> tuple[Tensor, ...]:
        sent = tuple(g.to(o.dtype) for o, g in zip(outputs, grads, strict=False))
        return torch.autograd.grad(outputs[: len(sent)], list(leaves.values()), sent)

    def results() -> Results:
        outputs = forward()
        found = {f"out{k}": o.detach() for k, o in enumerate(outputs)}
        names = [f"d_{name}" for name in leaves]
        return found | (dict(zip(names, backward(outputs), strict=True)) if train else {})

    return Program((lambda: backward(forward())) if train else forward, results, train, backend)


def chosen_backend(explanation: Explanation, backend: str) -> str:
    """Which backend runs the explained call, `backend` being asked for; NotRunnable with its reason where none does."""
    if explanation.chosen is None:
        raise NotRunnable(next(v.reason for v in explanation if v.backend == backend))
    return explanation.chosen


def compiled(program: Program) -> Program:
    """`program`, of a compiled module, after its first call, which compiles."""
    begin = time.perf_counter()
    try:
        with torch.set_grad_enabled(program.grad):
            program.step()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except torch._dynamo.exc.TorchDynamoException as error:
        raise NotRunnable(f"torch.compile raised {type(error).__name__}") from error
    return replace(program, first=time.perf_counter() - begin)


def torch_program(problem: LayerProblem) -> Program:
    """Stock torch.nn. Where the case has lengths it packs and pads, as its user has to."""
    program = module_program(_load(module_of(nn, problem.case), problem), problem, _packing_call, "torch.nn")
    return replace(program, note=algorithm(problem.case) or onednn(problem.case) or "")


def fastseq_program(problem: LayerProblem, backend: str) -> Program:
    """fastseq with `backend=` forced, or "auto"; the program says which one runs."""
    module = _load(module_of(fastseq, problem.case, backend=backend), problem)
    with torch.set_grad_enabled(problem.case.mode == "train"), _precision(problem):
        x, hx = _arguments(problem, list(problem.hx))
        chosen = chosen_backend(fastseq.explain(module, x, hx, lengths=_lengths(problem)), backend)
    program = module_program(module, problem, lengths_call, chosen)
    return replace(program, note=predicted(problem.case)) if chosen == "cuda" else program


def predicted(case: LayerCase) -> str:
    """What the cost model of the CUDA kernels says of a layer's or a cell's, to stand beside what was measured."""
    single = case.T == 1 and case.layers == 1 and not case.bidirectional and case.rows == "full"  # rnn_step.h's
    dtype = torch.bfloat16 if case.dtype == "autocast" else getattr(torch, case.dtype)
    kind = kind_of(dtype, tf32_flag("matmul" if single else "rnn"))
    device, directions = devices.of(torch.device(case.device)), 2 if case.bidirectional else 1
    ways = ("forward", "backward") if case.mode == "train" else ("forward",)
    plans = [plan(case.cell, case.B, case.H, kind, device, directions, way) for way in ways]
    told = [us_a_step(p.step * p.waves, p.shape.design) for p in plans]
    if single:
        told[0] = us_a_step(one_step(case.cell, case.B, case.I, case.H, kind, device), "one launch")
    return f"predicted {' and '.join(told)}"


def us_a_step(us: float, how: str) -> str:
    return f"{us:.2f} us a step ({how})"


def frozen_refuses(case: LayerCase) -> str | None:
    if case.mode == "train":
        return "forward only"
    return "on the CPU only" if case.device != "cpu" else None


def frozen_program(problem: LayerProblem) -> Program:
    """The fused CPU kernels on weights that are packed once."""
    module = fastseq.freeze(_load(module_of(fastseq, problem.case, backend="cpu"), problem))
    return module_program(module, problem, lengths_call, "cpu, frozen")


def compile_refuses(case: LayerCase) -> str | None:
    if case.rows != "full":
        return "packing breaks the graph"
    if case.cell == "gru" and case.T > 1:
        return "a GRU's steps are unrolled: 50 of them did not compile in four minutes"
    return None


def compiled_program(problem: LayerProblem) -> Program:
    """torch.compile of stock torch.nn, which by itself leaves recurrent modules alone: `allow_rnn` is set."""
    module = _load(module_of(nn, problem.case), problem)
    with torch._dynamo.config.patch(allow_rnn=True):
        unrolled = torch.compile(module, dynamic=False)
        return compiled(module_program(unrolled, problem, _packing_call, "torch.compile"))


def _load(module: nn.Module, problem: LayerProblem) -> nn.Module:
    module.load_state_dict(problem.weights)
    return module.to(problem.case.device).train(problem.case.mode == "train")


def _lengths(problem: LayerProblem) -> Tensor | None:
    if problem.case.rows != "lengths" or problem.lengths is None:
        return None
    return problem.lengths.to(problem.case.device)


def _precision(problem: LayerProblem) -> AbstractContextManager[Any]:
    return torch.autocast(problem.case.device, torch.bfloat16) if problem.case.dtype == "autocast" else nullcontext()


def _arguments(problem: LayerProblem, hx: list[Tensor]) -> tuple[Any, Any]:
    """(input, hx) as the module takes them; packed data are packed here, once."""
    x = problem.packed() if problem.case.rows == "packed" else problem.x.detach()
    return x, None if not hx else tuple(hx) if problem.case.cell == "lstm" else hx[0]


Call = Callable[[Any, Any, Any], list[Tensor]]  # of module, x, hx


def lengths_call(problem: LayerProblem) -> Call:
    """Lengths lie where the input does, as a user's would."""
    lengths = _lengths(problem)
    if lengths is None:
        return lambda module, x, hx: flatten(module(x, hx))
    return lambda module, x, hx: flatten(module(x, hx, lengths=lengths))


def _packing_call(problem: LayerProblem) -> Call:
    """Lengths lie where packing wants them, on the host."""

    def pack_and_pad(module: Any, x: Any, hx: Any) -> list[Tensor]:
        out, state = module(pack_padded_sequence(x, cast(Tensor, problem.lengths), enforce_sorted=False), hx)
        return [pad_packed_sequence(out, total_length=problem.case.T)[0], *flatten(state)]

    return pack_and_pad if problem.case.rows == "lengths" else lambda module, x, hx: flatten(module(x, hx))


def module_program(
    module: Any,
    problem: LayerProblem,
    call_of: Callable[[Any], Call],
    backend: str,
    weights: Mapping[str, Tensor] | None = None,  # the module's, by the layer's names; None: it has these names
) -> Program:
    """A call of `module`, and in training the gradients of input, states and weights."""
    call, train = call_of(problem), problem.case.mode == "train"
    x, hx = _arguments(problem, [h.detach().requires_grad_(train) for h in problem.hx])
    data = x if isinstance(x, Tensor) else x.data
    data.requires_grad_(train)
    states = [] if hx is None else flatten(hx)
    parameters = dict(module.named_parameters()) if weights is None else weights
    leaves = {"x": data} | {f"hx{k}": h for k, h in enumerate(states)} | dict(parameters)

    def forward() -> list[Tensor]:
        if problem.case.dtype != "autocast":
            return call(module, x, hx)
        with _precision(problem):
            return call(module, x, hx)

    return program_of(forward, leaves, problem.grads, train, backend)

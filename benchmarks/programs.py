"""A case made ready to run: the peers that are modules with torch.nn's interface, fastseq's among them."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq

from .cases import Case
from .problem import Problem, flatten, module_of

__all__ = ["NotRunnable", "Program", "compile_refuses", "compiled_program", "fastseq_program", "torch_program"]

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


def torch_program(problem: Problem) -> Program:
    """Stock torch.nn. Where the case has lengths it packs and pads, as its user has to."""
    return _module_program(_load(module_of(nn, problem.case), problem), problem, _packing_call, "torch.nn")


def fastseq_program(backend: str) -> Callable[[Problem], Program]:
    """fastseq with `backend=` forced, or "auto"; the program says which one runs."""

    def build(problem: Problem) -> Program:
        module = _load(module_of(fastseq, problem.case, backend=backend), problem)
        with torch.set_grad_enabled(problem.case.mode == "train"), _precision(problem):
            x, hx = _arguments(problem, list(problem.hx))
            chosen = fastseq.explain(module, x, hx, lengths=_lengths(problem)).chosen
        return _module_program(module, problem, _lengths_call, chosen or "none")

    return build


def compile_refuses(case: Case) -> str | None:
    if case.rows != "full":
        return "packing breaks the graph"
    if case.cell == "gru" and case.T > 1:
        return "a GRU's steps are unrolled: 50 of them did not compile in four minutes"
    return None


def compiled_program(problem: Problem) -> Program:
    """torch.compile of stock torch.nn, which by itself leaves recurrent modules alone: `allow_rnn` is set."""
    module = _load(module_of(nn, problem.case), problem)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, dynamic=False)
        program = _module_program(compiled, problem, _packing_call, "torch.compile")
        begin = time.perf_counter()
        try:
            with torch.set_grad_enabled(program.grad):
                program.step()
        except torch._dynamo.exc.TorchDynamoException as error:
            raise NotRunnable(f"torch.compile: {type(error).__name__}") from error
    note = f"compiled in {time.perf_counter() - begin:.1f} s"
    return Program(program.step, program.results, program.grad, program.backend, note)


def _load(module: nn.Module, problem: Problem) -> nn.Module:
    module.load_state_dict(problem.weights)
    return module.train(problem.case.mode == "train")


def _lengths(problem: Problem) -> Tensor | None:
    return problem.lengths if problem.case.rows == "lengths" else None


def _precision(problem: Problem) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if problem.case.dtype == "autocast" else nullcontext()


def _arguments(problem: Problem, hx: list[Tensor]) -> tuple[Any, Any]:
    """(input, hx) as the module takes them; packed data are packed here, once."""
    x = problem.packed() if problem.case.rows == "packed" else problem.x.detach()
    return x, None if not hx else tuple(hx) if problem.case.cell == "lstm" else hx[0]


Call = Callable[[Any, Any, Any, Problem], list[Tensor]]


def _lengths_call(module: Any, x: Any, hx: Any, problem: Problem) -> list[Tensor]:
    if problem.case.rows == "lengths":
        return flatten(module(x, hx, lengths=problem.lengths))
    return flatten(module(x, hx))


def _packing_call(module: Any, x: Any, hx: Any, problem: Problem) -> list[Tensor]:
    if problem.case.rows == "lengths":
        out, state = module(pack_padded_sequence(x, cast(Tensor, problem.lengths), enforce_sorted=False), hx)
        return [pad_packed_sequence(out, total_length=problem.case.T)[0], *flatten(state)]
    return flatten(module(x, hx))


def _module_program(module: Any, problem: Problem, call: Call, backend: str) -> Program:
    train = problem.case.mode == "train"
    x, hx = _arguments(problem, [h.detach().requires_grad_(train) for h in problem.hx])
    data = x if isinstance(x, Tensor) else x.data
    data.requires_grad_(train)
    states = [] if hx is None else flatten(hx)
    names = ["d_x", *(f"d_hx{k}" for k in range(len(states))), *(f"d_{n}" for n, _ in module.named_parameters())]
    leaves, grads, autocast = [data, *states, *module.parameters()], problem.grads, problem.case.dtype == "autocast"

    def forward() -> list[Tensor]:
        if not autocast:
            return call(module, x, hx, problem)
        with _precision(problem):
            return call(module, x, hx, problem)

    def backward(outputs: list[Tensor]) -> tuple[Tensor, ...]:
        sent = tuple(g.to(o.dtype) for o, g in zip(outputs, grads, strict=False))
        return torch.autograd.grad(outputs[: len(sent)], leaves, sent)

    def results() -> Results:
        outputs = forward()
        found = {f"out{k}": o.detach() for k, o in enumerate(outputs)}
        return found | (dict(zip(names, backward(outputs), strict=True)) if train else {})

    return Program((lambda: backward(forward())) if train else forward, results, train, backend)

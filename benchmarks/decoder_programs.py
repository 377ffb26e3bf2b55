"""A decoder's case made ready to run: fastseq's operator, and the loop in PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import fastseq
from fastseq import functional
from fastseq.backends import decoder_cuda
from fastseq.backends.decoder_call import DecoderCall
from fastseq.spec import AttentionParams, CellParams, DecoderParams, DecoderSpec, DecoderState, Keys

from .decoder_cases import TeacherForced
from .decoder_problem import Batch, DecoderProblem, loop_of
from .graphs import graphed
from .programs import Program, Results, chosen_backend, compiled, program_of, us_a_step

__all__ = ["compile_refuses", "compiled_loop_program", "fastseq_program", "graphed_loop_program", "loop_program"]

Weights = Mapping[str, Tensor]  # of the loop's module, by its names
Decode = Callable[[Tensor, Tensor, Tensor], Tensor]  # y [B, T, H], memory [B, S, H], mask [B, S] -> [B, T, H]


def loop_program(problem: DecoderProblem) -> Program:
    """The loop, eagerly."""
    loop = _loop(problem)
    return _program(loop, dict(loop.named_parameters()), problem, "loop")


def compile_refuses(case: TeacherForced) -> str | None:
    return "compiled anew for every batch's shape" if case.kind == "corpus" else None


def compiled_loop_program(problem: DecoderProblem) -> Program:
    """The loop under torch.compile, all its steps in one graph."""
    loop = _loop(problem)
    decode = torch.compile(loop, dynamic=False)
    return compiled(_program(decode, dict(loop.named_parameters()), problem, "loop.compile"))


def graphed_loop_program(problem: DecoderProblem) -> Program:
    """The loop captured in a CUDA graph, forward and, in training, backward: one launch for all of its kernels."""
    return graphed(loop_program(problem))


def fastseq_program(problem: DecoderProblem, backend: str) -> Program:
    """fastseq's decoder with `backend=` forced, or "auto"; the program says which one runs."""
    train, spec = problem.case.mode == "train", _spec(problem.case)
    weights = {name: w.detach().requires_grad_(train) for name, w in problem.weights.items()}
    first = problem.batches[0]  # the others differ in size alone
    with torch.set_grad_enabled(train), fastseq.use_backend(backend):
        keys, state, params = _arguments(spec, weights, first.y, first.memory, first.mask)
        call = DecoderCall(spec, first.y, keys, state, params)
        chosen = chosen_backend(fastseq.explain(call), backend)

    def decode(y: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        keys, state, params = _arguments(spec, weights, y, memory, mask)
        return functional.attention_decoder(y, keys, state, params, spec, backend=backend).output

    program = _program(decode, weights, problem, chosen)
    return replace(program, note=_predicted(call, train, len(problem.batches))) if chosen == "cuda" else program


def _predicted(call: DecoderCall, train: bool, batches: int) -> str:
    """What the cost model of the CUDA kernels says of the first batch's loop, to stand beside what was measured."""
    plans = decoder_cuda.layout(call)[: 2 if train else 1]
    told = " and ".join(us_a_step(p.step * p.waves, p.shape.design) for p in plans)
    return f"predicted {told}{', of the first batch' if batches > 1 else ''}" if told else ""


def _loop(problem: DecoderProblem) -> nn.Module:
    loop = loop_of(problem.case)
    loop.load_state_dict(problem.weights)
    return loop.to(problem.case.device).train(problem.case.mode == "train")


def _spec(case: TeacherForced) -> DecoderSpec:
    """What the case's loop computes."""
    if case.attention == "bahdanau":
        return DecoderSpec(case.cell, attend="before", context_to="first", readout=("state",))
    return DecoderSpec(case.cell, attend="after", feed="output", readout=("context", "state"), combine="tanh")


def _arguments(
    spec: DecoderSpec,
    weights: Weights,
    y: Tensor,  # [B, T, H]
    memory: Tensor,  # [B, S, H]
    mask: Tensor,  # [B, S]
) -> tuple[Keys, DecoderState, DecoderParams]:
    """The loop's weights and first state as the operator takes them; the keys projected, once."""
    keys = Keys(linear(memory, weights["keys.weight"]), memory, mask)
    zeros = y.new_zeros(y.shape[0], y.shape[2])
    cell: CellParams = (
        weights["cell.weight_ih"], weights["cell.weight_hh"], weights["cell.bias_ih"], weights["cell.bias_hh"],
    )  # fmt: skip
    additive = spec.attend == "before"
    attention = AttentionParams(weights["query.weight"], weights["energy.weight"][0]) if additive else AttentionParams()
    readout = None if additive else (weights["combine.weight"], None)
    state = DecoderState(((zeros, zeros) if spec.cell == "lstm" else (zeros,),), None if additive else zeros)
    return keys, state, DecoderParams((cell,), attention=attention, readout=readout)


def _program(decode: Decode, weights: Weights, problem: DecoderProblem, backend: str) -> Program:
    train = problem.case.mode == "train"
    programs = [_batch_program(decode, weights, batch, train, backend) for batch in problem.batches]
    return programs[0] if len(programs) == 1 else _in_turn(programs, {f"d_{name}" for name in weights})


def _batch_program(decode: Decode, weights: Weights, batch: Batch, train: bool, backend: str) -> Program:
    y, memory = (t.detach().requires_grad_(train) for t in (batch.y, batch.memory))
    forward = partial(decode, y, memory, batch.mask)
    return program_of(lambda: [forward()], {"y": y, "memory": memory, **weights}, [batch.grad], train, backend)


def _in_turn(programs: Sequence[Program], shared: set[str]) -> Program:
    """One after another; of their results, those of a `shared` name are added up, the others numbered."""

    def step() -> None:
        for program in programs:
            program.step()

    def results() -> Results:
        found: Results = {}
        for k, program in enumerate(programs):
            for name, value in program.results().items():
                if name in shared:
                    found[name] = found[name] + value if name in found else value
                else:
                    found[f"{name} of batch {k}"] = value
        return found

    return Program(step, results, programs[0].grad, programs[0].backend)

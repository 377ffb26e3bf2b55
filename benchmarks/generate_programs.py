"""A search's case made ready to run: fastseq's `Seq2Seq.generate`, and the batched loop in PyTorch."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from fastseq.backends import decoder_cuda

from .generate_cases import GenerateCase
from .generate_loop import BOS, EOS, PAD, SearchLoop
from .generate_problem import GenerateProblem, loop_of
from .problem import DTYPES
from .programs import Program, chosen_backend, compiled, program_of

__all__ = ["compiled_loop_program", "fastseq_program", "loop_program"]

NAMES = {  # the decoder's parameters by the loop's
    "cell.weight_ih": "weight_ih_l0", "cell.weight_hh": "weight_hh_l0", "cell.bias_ih": "bias_ih_l0",
    "cell.bias_hh": "bias_hh_l0", "keys.weight": "attention.weight_memory", "query.weight": "attention.weight_query",
    "energy.weight": "attention.v", "combine.weight": "readout.weight",
}  # fmt: skip


class Fixed(nn.Module):
    """An encoder whose memory exists already: the search alone is timed."""

    def __init__(self, memory: fastseq.Memory) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, src: Tensor, lengths: Tensor | None = None) -> fastseq.Memory:
        return self.memory


def loop_program(problem: GenerateProblem) -> Program:
    """The loop, eagerly."""
    return _loop_program(_loop(problem), problem, "loop")


def compiled_loop_program(problem: GenerateProblem) -> Program:
    """The loop with its step, up to the logits, under torch.compile."""
    loop = _loop(problem)
    loop.step = torch.compile(loop.step, dynamic=False)  # type: ignore[method-assign]
    return compiled(_loop_program(loop, problem, "loop.compile"))


def fastseq_program(problem: GenerateProblem, backend: str) -> Program:
    """`generate` of a model whose decoder has `backend=` forced, or "auto"; the program says which one runs."""
    case, model = problem.case, _model(problem, backend)
    src = torch.zeros(case.B, case.S, dtype=torch.int64, device=case.device)
    with torch.no_grad():
        chosen = chosen_backend(fastseq.explain(model, src, src[:, :1]), backend)

    def search() -> list[Tensor]:
        found = model.generate(src, max_new_tokens=case.T, num_beams=case.beams)
        return [found.sequences[:, 0], found.scores[:, 0]]

    program = program_of(search, {}, [], False, chosen)
    return replace(program, note=_way(model, src, case.T)) if chosen == "cuda" and case.beams == 1 else program


def _way(model: fastseq.Seq2Seq, src: Tensor, steps: int) -> str:
    """Which way the CUDA kernels search, and what their cost model says of it, to stand beside what was measured."""
    assert model.vocabulary is not None
    with torch.no_grad():
        found = decoder_cuda.layout_of_search(model.as_call(src, src[:, :1]), model.vocabulary, steps)
    if isinstance(found, str):
        return f"step by step: {found}"
    return f"one launch, predicted {found.step * found.waves:.2f} us a step ({found.shape.design})"


def _loop(problem: GenerateProblem) -> SearchLoop:
    loop = loop_of(problem.case)
    loop.load_state_dict(problem.weights)
    return loop.to(problem.case.device).eval()


def _loop_program(loop: SearchLoop, problem: GenerateProblem, backend: str) -> Program:
    case = problem.case
    return program_of(lambda: list(loop(problem.memory, problem.mask, case.T, case.beams)), {}, [], False, backend)


def _model(problem: GenerateProblem, backend: str) -> fastseq.Seq2Seq:
    """The loop's weights in our modules."""
    encoder = Fixed(fastseq.Memory(problem.memory, problem.mask))
    decoder = _decoder(problem.case, backend)
    model = fastseq.Seq2Seq(encoder, decoder, problem.case.V, bos_id=BOS, eos_id=EOS, pad_id=PAD)
    weights = {f"decoder.{NAMES[name]}" if name in NAMES else name: w for name, w in problem.weights.items()}
    if "decoder.attention.v" in weights:
        weights["decoder.attention.v"] = weights["decoder.attention.v"][0]
    model.load_state_dict(weights)
    return model.to(problem.case.device).eval()


def _decoder(case: GenerateCase, backend: str) -> fastseq.Decoder:
    """What the case's loop computes at a step, from a state of zeros."""
    options: dict[str, Any] = {
        "cell": case.cell, "memory_size": case.H, "bridge": "zero", "backend": backend, "dtype": DTYPES[case.dtype],
    }  # fmt: skip
    if case.attention == "luong":
        return fastseq.Decoder.luong(case.H, case.H, **options)
    return fastseq.Decoder(
        case.H, case.H, attention="additive", context_to="first", readout=("state",), combine=None, **options
    )

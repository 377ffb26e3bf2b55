"""An attention's case made ready to run: fastseq's operator, the obvious PyTorch, and PyTorch's fused dot product."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

import fastseq
from fastseq import functional
from fastseq.backends.decoder_call import AttentionCall
from fastseq.spec import AttentionParams, Keys

from .decoder_cases import AttentionCase
from .decoder_problem import AttentionProblem
from .programs import Program, chosen_backend, compiled, program_of

__all__ = ["compiled_plain_program", "fastseq_program", "plain_program", "sdpa_program", "sdpa_refuses"]

# query [B, T, H], keys and memory [B, S, H], the weights by name -> contexts [B, T, H]
Attend = Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor]], Tensor]


def plain_program(problem: AttentionProblem) -> Program:
    """The formula, operator by operator, for all queries at once."""
    return _program(_formula(problem), problem, "plain")


def _formula(problem: AttentionProblem) -> Attend:
    def attend(query: Tensor, keys: Tensor, memory: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        if weights:
            asked = linear(query, weights["w_query"])
            scores = linear(torch.tanh(keys[:, None] + asked[:, :, None]), weights["v"][None]).squeeze(-1)
        else:
            scores = torch.bmm(query, keys.mT)
        masked = scores.masked_fill(~problem.mask[:, None], torch.finfo(scores.dtype).min)
        return torch.bmm(masked.softmax(-1), memory)

    return attend


def compiled_plain_program(problem: AttentionProblem) -> Program:
    """torch.compile of the formula."""
    return compiled(_program(torch.compile(_formula(problem), dynamic=False), problem, "plain.compile"))


def sdpa_refuses(case: AttentionCase) -> str | None:
    return None if case.score == "dot" else "dot scores only"


def sdpa_program(problem: AttentionProblem) -> Program:
    """torch.nn.functional.scaled_dot_product_attention without its scale; one head."""
    mask = problem.mask[:, None, None]

    def attend(query: Tensor, keys: Tensor, memory: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        one_head = query[:, None], keys[:, None], memory[:, None]
        return scaled_dot_product_attention(*one_head, attn_mask=mask, scale=1.0)[:, 0]

    return _program(attend, problem, "sdpa")


def fastseq_program(problem: AttentionProblem, backend: str) -> Program:
    """fastseq's attention with `backend=` forced, or "auto"; the program says which one runs."""

    def arguments(keys: Tensor, memory: Tensor, weights: Mapping[str, Tensor]) -> tuple[Keys, AttentionParams]:
        return Keys(keys, memory, problem.mask), AttentionParams(weights.get("w_query"), weights.get("v"))

    def attend(query: Tensor, keys: Tensor, memory: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return functional.attention(query, *arguments(keys, memory, weights), backend=backend)[0]

    with torch.set_grad_enabled(problem.case.mode == "train"), fastseq.use_backend(backend):
        call = AttentionCall(problem.query, *arguments(problem.keys, problem.memory, problem.weights))
        chosen = chosen_backend(fastseq.explain(call), backend)
    return _program(attend, problem, chosen)


def _program(attend: Attend, problem: AttentionProblem, backend: str) -> Program:
    train = problem.case.mode == "train"
    inputs = {"query": problem.query, "keys": problem.keys, "memory": problem.memory}
    leaves = {name: t.detach().requires_grad_(train) for name, t in (inputs | problem.weights).items()}
    query, keys, memory = (leaves[name] for name in inputs)
    weights = {name: leaves[name] for name in problem.weights}
    return program_of(lambda: [attend(query, keys, memory, weights)], leaves, [problem.grad], train, backend)

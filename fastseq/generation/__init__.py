"""fastseq.generate: greedy search, beam search and sampling with any step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .request import Request
from .scores import LogitsProcessor
from .search import GenerateOutput, Reorder, Step, run_search

__all__ = ["GenerateOutput", "LogitsProcessor", "generate"]


@torch.no_grad()
def generate(
    step: Step,
    state: Any,
    *,
    batch_size: int,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    length_penalty: float = 1.0,
    length_norm: str = "len",
    coverage_penalty: float = 0.0,
    early_stopping: bool | str = False,
    no_repeat_ngram_size: int = 0,
    num_return_sequences: int = 1,
    decoder_input_ids: Tensor | Sequence[Sequence[int]] | None = None,
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
    streamer: Any = None,  # a function of tokens, or with put and end
    generator: torch.Generator | None = None,
    return_weights: bool = False,
    reorder: Reorder | None = None,
    device: torch.device | str | None = None,
) -> GenerateOutput:
    """Sequences from any step: greedy, by beams, or drawn; without gradients.

    step: (tokens [N] int64, state) -> (logits [N, V], state) or (logits, state, weights [N, S]), where N = B * k for
    each of B = batch_size rows has k together: num_beams, or num_return_sequences of a drawn one. A row that has ended
    goes on, with pad_id but for beams, and is not looked at.
    state: any pytree of tensors with B rows at dim 0, which are repeated for the k; then `reorder(state, index [N])`
    picks rows of it, by default index_select on every tensor. With `reorder` the state is N rows already, and may be
    anything. What all beams of a row share, such as the memory, belongs into the step, not into the state.
    device: of the tokens; None: of the state's first tensor, else the CPU.

    max_new_tokens, min_new_tokens: beside bos and forced tokens; eos counts for the most, and comes after the least.
    What reaches the most ends without eos.
    num_beams: 1 is greedy. num_return_sequences: hypotheses of each row, at most num_beams; with do_sample, draws, the
    likeliest first.
    do_sample: draws from the softmax of scores / temperature, of the top_k likeliest tokens (0: all), of those the
    fewest that have probability top_p together; by `generator` or torch's own.
    length_penalty, length_norm: a hypothesis' log-probability is divided by length^length_penalty ("len"), or by
    ((5 + length) / 6)^length_penalty ("wu": Wu et al. 2016, eq. 14); length counts new tokens and eos.
    coverage_penalty: the beta of that equation, on the weights that the step returns. A position to which no beam of
    the row ever gave any is taken for one behind the mask.
    early_stopping: when a row is done with num_beams whole hypotheses: True at once; False as soon as no beam's score
    by now beats the worst of them; "never" as soon as none could, at its longest (as transformers has it).
    no_repeat_ngram_size: no n-gram comes twice in a row of tokens, bos and prefix included. 0: any may.
    decoder_input_ids: [B, P] forced first tokens; bos is put before them unless they start with it.
    logits_processor: one or several (ids [N, L] from bos on, scores [N, V]) -> scores, as transformers calls them. The
    scores are log-probabilities, which transformers has for beams alone.
    streamer: called with every step's tokens [N], or a transformers' streamer with put and end; not with beams.

    Scores, by which draws are ordered too, are sums of the new tokens' log-probabilities over their norm, in fp32 (fp64
    of fp64 logits), after the processors and before the temperature. Where nothing may come next, a row ends without
    eos; a beam is given up. Of a step, the host is told only whether all rows are done and whether a score is NaN,
    which raises InputError.

    Raises InputError or TypeError, naming the option, before the first step; what a step returns is checked as it does.
    """
    for name, function in (("step", step), ("reorder", reorder)):
        if not callable(function) and not (name == "reorder" and function is None):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    tensors = [t for t in pytree.tree_leaves(state) if isinstance(t, Tensor)]
    place = torch.device(device) if device is not None else tensors[0].device if tensors else torch.device("cpu")
    request = Request.of(
        batch_size=batch_size, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens, num_beams=num_beams, do_sample=do_sample, temperature=temperature, top_k=top_k,
        top_p=top_p, length_penalty=length_penalty, length_norm=length_norm, coverage_penalty=coverage_penalty,
        early_stopping=early_stopping, no_repeat_ngram_size=no_repeat_ngram_size,
        num_return_sequences=num_return_sequences, decoder_input_ids=decoder_input_ids,
        logits_processor=logits_processor, streamer=streamer, generator=generator, return_weights=return_weights,
        device=place,
    )  # fmt: skip
    return run_search(step, state, request, reorder)

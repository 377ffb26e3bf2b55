"""Greedy search on a GPU: the choice of the token stays there, and the host looks only once in `CHUNK` steps.

A step is the same work on the same buffers each time, so that from the second one on a CUDA graph repeats it. A graph
lives as long as its search: no other call can find a stale address in it. Letters as in `decoder_search`.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .decoder_search import Found, Search, Vocabulary

__all__ = ["CHUNK", "Rows", "State", "Whole", "chunked_search"]

CHUNK = 16  # steps

State = tuple[Tensor, ...]
# (y [N, T, I], state) -> (output [N, R] of the last step, state, weights [N, T, S] or None)
Run = Callable[[Tensor, State], tuple[Tensor, State, Tensor | None]]


class Rows(NamedTuple):
    """What a step changes, in place."""

    tokens: Tensor  # [N] int64: what each row reads next
    total: Tensor  # [N]: the log-probability of its new tokens, fp32
    lengths: Tensor  # [N] int64: how many they are
    running: Tensor  # [N] bool
    wrong: Tensor  # [] bool: a logit of a row that runs was NaN or +inf
    at: Tensor  # [1] int64: new tokens so far
    ids: Tensor  # [N, most new ones]
    weights: Tensor | None  # [N, as ids, S]


Whole = Callable[[State, Rows], None]


def chunked_search(
    run: Run, state: State, of: Vocabulary, search: Search, source: int, whole: Whole | None = None
) -> Found:
    """The likeliest token of each row, step after step. state: leaves with the batch at dimension 0; source: S.

    whole: what chooses all tokens by itself, from the state after the forced ones on.
    """
    assert search.copies == 1
    batch, most = len(search.prefix), len(search.norms) - 1
    forced, seen = search.prefix[:, :-1], None
    if forced.shape[1]:
        _, state, seen = run(of.embedding[forced], state)
    rows = _begin(search, of, source)
    if whole is not None:
        whole(state, rows)
    else:
        state = tuple(leaf.clone() for leaf in state)  # written in place from here on
        with torch.cuda.device_of(rows.tokens):
            _follow(lambda: _step(run, state, rows, of, search), rows, most)
    lengths = rows.lengths + forced.shape[1]
    tokens = torch.cat((search.prefix[:, 1:], rows.ids), 1)
    norms = torch.tensor(search.norms, device=rows.total.device)
    weights = rows.weights
    if weights is not None and seen is not None:
        weights = torch.cat((seen, weights), 1)
    return Found(
        tokens[:, None], lengths[:, None], (rows.total / norms[rows.lengths])[:, None],
        tokens.new_zeros((batch, 1, tokens.shape[1])), weights, bool(rows.wrong),
    )  # fmt: skip


def _begin(search: Search, of: Vocabulary, source: int) -> Rows:
    tokens = search.prefix[:, -1].clone()
    (batch,), most = tokens.shape, len(search.norms) - 1
    return Rows(
        tokens, tokens.new_zeros(batch, dtype=torch.float32), torch.zeros_like(tokens),
        torch.ones_like(tokens, dtype=torch.bool), tokens.new_zeros((), dtype=torch.bool), tokens.new_zeros(1),
        tokens.new_full((batch, most), search.pad_id),
        of.weight.new_zeros(batch, most, source) if search.need_weights else None,
    )  # fmt: skip


def _follow(step: Callable[[], None], rows: Rows, most: int) -> None:
    """At most so many steps, until every row has ended: the first as it is, which compiles what must be compiled."""
    repeat = step
    for done in range(1, most + 1):
        if done == 2 and rows.tokens.is_cuda:
            repeat = _recorded(step, rows.tokens.device).replay
        repeat()
        if done % CHUNK == 0 and done < most and not bool(rows.running.any()):  # the host waits here, and nowhere else
            return


def _recorded(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """`step` as a graph, which has not run yet. One at a time, and other threads may use the GPU meanwhile."""
    graph, stream, current = torch.cuda.CUDAGraph(), _stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with _recording, torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        except BaseException:
            with suppress(RuntimeError):  # that the recording failed, as it does if the GPU refused part of the step
                graph.capture_end()  # else the stream would record on, and no other search could
            raise
        graph.capture_end()
    current.wait_stream(stream)
    return graph


_recording = Lock()


@lru_cache(maxsize=64)
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for each GPU: a stream of another's would record nothing, and every new one costs cuBLAS a workspace."""
    return torch.cuda.Stream(device)


def _step(run: Run, state: State, rows: Rows, of: Vocabulary, search: Search) -> None:
    """The next token of every row that runs, all in place."""
    output, new, weights = run(of.embedding[rows.tokens][:, None], state)
    for leaf, value in zip(state, new, strict=True):
        leaf.copy_(value)
    logits = linear(output, of.weight, of.bias).float()
    wrong = logits.isnan() | (logits == torch.inf)  # of which the softmax would make NaN
    rows.wrong.logical_or_((wrong.any(-1) & rows.running).any())
    logits = logits.masked_fill(wrong, -torch.inf)
    norm = torch.logsumexp(logits, -1)
    if search.min_new_tokens:
        early = rows.at < search.min_new_tokens
        logits[:, search.eos_id] = torch.where(early, -torch.inf, logits[:, search.eos_id])
    best, token = logits.max(-1)
    runs = rows.running & (best > -torch.inf)  # a row with nothing that may come ends
    rows.total.add_(torch.where(runs, best - norm, 0))
    token = torch.where(runs, token, search.pad_id)
    rows.tokens.copy_(token)
    rows.ids.scatter_(1, rows.at.expand(len(token), 1), token[:, None])
    if rows.weights is not None and weights is not None:
        kept = torch.where(runs[:, None], weights[:, 0], 0)
        rows.weights.scatter_(1, rows.at.view(1, 1, 1).expand(len(kept), 1, kept.shape[1]), kept[:, None])
    rows.lengths.add_(runs)
    rows.running.copy_(runs & (token != search.eos_id))
    rows.at.add_(1)

"""A search on the native kernels: a decoder's loop that reads the tokens it chose itself, `fastseq._C.decoder_search`.

csrc/cpu/search.h has the rules, csrc/cpu/decoder.h the arguments. Letters as in `decoder`; besides V tokens, k rows of
each of B memory rows (beams; N = B * k), R hypotheses wanted, P forced tokens from bos on, T = P - 1 + the most new
ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from .common import address
from .decoder_native import memory_gates_of, native_cells, native_sizes, native_tensors
from .decoder_types import LoopSpec, LoopTensors, parts
from .linear import product

__all__ = ["Found", "Search", "Vocabulary", "decoder_search"]

_STOPPING = {False: 0, True: 1, "never": 2}


class Vocabulary(NamedTuple):
    """What makes a step's input of a token, and scores of a step's output; all of y's dtype and contiguous."""

    embedding: Tensor  # [V or more, I]
    weight: Tensor  # [V, R, or without a readout's weights P]
    bias: Tensor | None  # [V]


class Search(NamedTuple):
    """What is asked for; numbers as in `generate`."""

    prefix: Tensor  # [B, P] int64
    norms: Sequence[float]  # what a hypothesis of 0, 1, ... new tokens is divided by, to the most
    copies: int  # k
    returned: int
    min_new_tokens: int
    eos_id: int
    pad_id: int
    early_stopping: bool | str
    rewards_length: bool  # the norm rises with the length
    need_weights: bool


class Found(NamedTuple):
    """Hypotheses, the best first. Of tokens and trail T may be less: at least the longest length."""

    tokens: Tensor  # [B, R, T] int64, without bos, padded behind the length
    lengths: Tensor  # [B, R]
    scores: Tensor  # [B, R], -inf where there are fewer
    trail: Tensor  # [B, R, T]: which of the k rows chose each token
    weights: Tensor | None  # [N, T, S]
    wrong: bool  # a logit was NaN or +inf


def decoder_search(
    loop: LoopSpec,  # all of the decoder: every layer, attention and readout
    x: LoopTensors,  # y [N, 1, I]: its shape alone is looked at; without keys, memory is the fixed context [B, 1, D]
    of: Vocabulary,
    search: Search,
) -> Found:
    """The likeliest tokens of each row, or of k > 1 a beam search over the k rows of each memory row."""
    assert _native.C is not None
    x = x.dense(loop)
    (rows, _, inputs), batch = x.y.shape, len(search.prefix)
    assert rows == batch * search.copies
    steps = search.prefix.shape[1] - 1 + len(search.norms) - 1
    shape = (batch, search.returned, steps)
    tokens, trail = torch.full(shape, search.pad_id), torch.zeros(shape, dtype=torch.int64)
    lengths, scores = torch.empty(shape[:2], dtype=torch.int64), torch.empty(shape[:2])
    norms = torch.tensor(search.norms, dtype=torch.float32)
    columns = parts(loop, x)
    table, read_table = _tables(loop, x, of, steps, columns)
    gates = memory_gates_of(loop, x, steps) if x.keys is not None else None
    hs = x.y.new_empty(loop.cells, rows, 2, x.hidden)
    contexts = None if x.memory is None else x.y.new_empty(rows, 2, x.memory.shape[2])
    weights = x.y.new_empty(rows, steps, x.keys.shape[1]) if search.need_weights and x.keys is not None else None
    sizes = native_sizes(loop, x, False) | {"copies": search.copies, "steps": steps}
    outs = x.y.new_empty(rows, 2, sizes["output"]) if x.w_read is not None else None
    tensors = native_tensors(loop, x, (hs, contexts, outs, weights, None, None, None, None)) | {
        "projected": address(table), "read_input": address(read_table), "memory_gates": address(gates), "feed_n": 0,
        "projected_pitch": 0 if table is None else table.stride(0),
        "w_r_pitch": max((end for _, end in columns.values()), default=0),
    }  # fmt: skip
    found = {
        "vocabulary": len(of.weight), "inputs": inputs, "returned": search.returned,
        "forced": search.prefix.shape[1], "fewest": search.min_new_tokens, "eos": search.eos_id, "pad": search.pad_id,
        "stopping": _STOPPING[search.early_stopping], "rewards_length": int(search.rewards_length),
        "embedding": address(of.embedding), "w_out": address(of.weight), "b_out": address(of.bias),
        "context": address(x.memory) if x.keys is None else 0,
        "r_input": columns["input"][0] if "input" in columns else -1, "prefix": address(search.prefix),
        "norms": address(norms), "tokens": address(tokens), "trail": address(trail), "lengths": address(lengths),
        "scores": address(scores),
    }  # fmt: skip
    wrong = _native.C.decoder_search(sizes, tensors, native_cells(loop, x), found)
    return Found(tokens, lengths, scores, trail, weights, wrong)


def makes_tables(tokens: int, rows: int, steps: int) -> bool:
    """Whether to make beforehand what every token's input comes to: less work than of each token that comes.

    The most steps are a bound that is rarely met; a row is taken for at most 32 long, however high that is.
    """
    return tokens <= rows * min(steps // 2, 32)


def _tables(
    loop: LoopSpec, x: LoopTensors, of: Vocabulary, steps: int, columns: dict[str, tuple[int, int]]
) -> tuple[Tensor | None, Tensor | None]:
    """What the first cell [V, G*H] and the readout [V, R'] make of every token, or None: of each as it comes."""
    embedding = of.embedding[: len(of.weight)]
    if not makes_tables(len(embedding), x.y.shape[0], steps):
        return None, None
    projected = product(embedding, x.weights[0][:, : embedding.shape[1]])
    if "input" not in columns or x.w_read is None:
        return projected, None
    at, end = columns["input"]
    return projected, product(embedding, x.w_read[:, at:end])

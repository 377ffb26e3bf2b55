"""fastseq.Attention against the papers' formulas in float64, row by row, and what it refuses."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import Attention, InputError, Keys, LocalP, Memory

B, T, S, Q, D, A = 3, 4, 6, 5, 7, 8
OPTIONS: list[dict[str, Any]] = [
    {"score": score, "attn_size": A, **more}
    for score in ("additive", "concat")
    for more in ({}, {"query_bias": True}, {"normalize": True}, {"normalize": True, "query_bias": True})
] + [{"score": score, "scale": scale} for score in ("general", "dot") for scale in (None, 0.3, 2, "learned")]
WINDOWS = [{"score": "additive"}, {"score": "dot"}, {"score": "general", "scale": "learned"}]


def build(options: dict[str, Any], dtype: torch.dtype = torch.float64) -> Attention:
    """With parameters that are all different from 0 and 1."""
    size = Q if options.get("score") == "dot" else D
    attention = Attention(Q, size, dtype=dtype, **options)
    with torch.no_grad():
        for p in attention.parameters():
            p += 0.2 * torch.randn_like(p)
    return attention


def memory_of(attention: Attention) -> Memory:
    """Rows with holes, one of them empty; what stands behind the mask is NaN."""
    out = torch.randn(B, S, attention.memory_size, dtype=torch.float64)
    mask = torch.rand(B, S) < 0.6
    mask[0, 0], mask[1] = True, False
    return Memory(torch.where(mask[..., None], out, torch.nan).requires_grad_(), mask)


def score(p: dict[str, Tensor], options: dict[str, Any], q: Tensor, m: Tensor) -> Tensor:
    """Of one query and one position."""
    scale = p.get("scale", options.get("scale") or 1.0)
    if options["score"] == "dot":
        return scale * (q @ m)
    if options["score"] == "general":
        return scale * (q @ p["weight_memory"] @ m)
    v = p["v"] / p["v"].norm() * p["g"] if "g" in p else p["v"]
    w = torch.cat((p["weight_query"], p["weight_memory"]), 1)  # W [q; m]
    return v @ torch.tanh(w @ torch.cat((q, m)) + p.get("bias", 0.0))


def plain(attention: Attention, options: dict[str, Any], queries: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    """Context [B, T, D] and weights [B, T, S], one query after another."""
    p, window = dict(attention.named_parameters()), options.get("window")
    contexts, rows = [], []
    for b, asked in enumerate(queries):
        there = memory.mask[b].nonzero()[:, 0]
        for q in asked:
            seen, bell = there, torch.ones(len(there), dtype=torch.float64)
            if window is not None and len(there):
                aim = len(there) * torch.sigmoid(p["v_window"] @ torch.tanh(p["weight_window"] @ q))
                seen = there[(there - aim).abs() <= window.D]
                bell = torch.exp(-((seen - aim) ** 2) / (2 * (window.D / 2) ** 2))
            scores = [score(p, options, q, memory.out[b, s]) for s in seen]
            weights = torch.stack(scores).softmax(0) * bell if scores else torch.zeros(0, dtype=torch.float64)
            contexts.append(weights @ memory.out[b, seen])
            rows.append(torch.zeros(S, dtype=torch.float64).index_put((seen,), weights))
    return torch.stack(contexts).view(B, T, -1), torch.stack(rows).view(B, T, S)


@pytest.mark.parametrize("options", [*OPTIONS, *({**w, "window": LocalP(2)} for w in WINDOWS)], ids=str)
def test_scores(options: dict[str, Any]) -> None:
    """Context, weights and every gradient of both, NaN behind the mask notwithstanding."""
    attention = build(options)
    memory, query = memory_of(attention), torch.randn(B, T, Q, dtype=torch.float64, requires_grad=True)
    inputs = [query, memory.out, *attention.parameters()]
    grads = [torch.randn(B, T, attention.memory_size).double(), torch.randn(B, T, S).double()]
    got = attention(query, attention.prepare(memory), need_weights=True)
    expected = plain(attention, options, query, memory)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    found, truth = (torch.autograd.grad(o, inputs, grads, allow_unused=True) for o in (got, expected))
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)
    assert not found[1][~memory.mask].any()


def test_one_query_a_row_and_beams() -> None:
    attention = build({"score": "additive"})
    memory, query = memory_of(attention), torch.randn(B * 2, Q, dtype=torch.float64)
    keys = attention.prepare(memory)
    context, weights = attention(query, keys, need_weights=True)
    many = attention(query[:, None], keys, need_weights=True)
    torch.testing.assert_close((context, weights), (many[0][:, 0], many[1][:, 0]))
    rows = Keys(*(None if t is None else t.repeat_interleave(2, 0) for t in keys))
    torch.testing.assert_close(context, attention(query, rows)[0])
    assert attention(query, keys)[1] is None


def test_initial_values() -> None:
    """Uniform as nn.Linear's; g is sqrt(1 / units) and the scale 1, as in tensorflow/nmt."""
    attention = Attention(400, 100, 64, query_bias=True, normalize=True)
    for name, inputs in (("weight_query", 400), ("weight_memory", 100), ("bias", 400), ("v", 64)):
        p = getattr(attention, name).detach()
        assert 0.8 * inputs**-0.5 < p.abs().max() <= inputs**-0.5
    assert attention.g.item() == 0.125
    joint = Attention(400, 100, score="concat")
    assert max(joint.weight_query.abs().max(), joint.weight_memory.abs().max()) <= 500**-0.5
    assert Attention(4, 4, score="dot", scale="learned").scale.item() == 1
    assert not list(Attention(4, 4, score="dot").parameters())


def test_copies_pickles_and_parametrizations() -> None:
    attention = build({"score": "additive", "normalize": True, "window": LocalP(2)})
    memory, query = memory_of(attention), torch.randn(B, Q, dtype=torch.float64)
    expected = attention(query, attention.prepare(memory))[0]
    for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(twin(query, twin.prepare(memory))[0], expected)
    torch.nn.utils.parametrizations.weight_norm(attention, "weight_memory")
    torch.testing.assert_close(attention(query, attention.prepare(memory))[0], expected)
    assert "normalize=True" in repr(attention)
    assert "window=LocalP(D=2)" in repr(attention)


def test_explain_and_backends() -> None:
    attention = build({"score": "general"})
    keys, query = attention.prepare(memory_of(attention)), torch.randn(B, Q, dtype=torch.float64)
    assert fastseq.explain(attention, query, keys).chosen == "reference"
    named = Attention(Q, D, score="general", backend="torch", dtype=torch.float64)
    with pytest.raises(InputError, match="torch has no attention of several queries"):
        named(query, keys)


PLAIN, OUT, MASK = Attention(Q, D), torch.zeros(B, S, D), torch.ones(B, S, dtype=torch.bool)
KEYS = PLAIN.prepare(Memory(OUT))
FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "dot of two sizes": (lambda: Attention(4, 5, score="dot"), r"query_size=4, memory_size=5.*use score='general'"),
    "unknown score": (lambda: Attention(4, 5, score="bilinear"), r"score='bilinear'; use one of 'additive', 'dot'"),
    "units of general": (lambda: Attention(4, 5, 6, score="general"), r"attn_size=6 with score='general'"),
    "no units": (lambda: Attention(4, 0), r"memory_size=0; it is at least 1"),
    "query_bias": (lambda: Attention(4, 4, score="dot", query_bias=True), r"query_bias=True with score='dot'"),
    "normalize": (lambda: Attention(4, 4, score="general", normalize=True), r"normalize=True with score='general'"),
    "scale of additive": (lambda: Attention(4, 5, scale=0.5), r"scale=0.5 with score='additive'.*normalize=True"),
    "unknown scale": (lambda: Attention(4, 4, score="dot", scale="sqrt"), r"scale='sqrt'; it is None, a float or"),
    "window": (lambda: LocalP(0), r"D=0 of LocalP; it is an int of at least 1"),
    "unknown backend": (lambda: Attention(4, 5, backend="gpu"), r"unknown backend='gpu'"),
    "no out": (lambda: PLAIN.prepare(Memory()), r"memory.out is None; .*pass Memory\(out\)"),
    "features": (lambda: PLAIN.prepare(Memory(OUT[..., :3])), r"shape \(3, 6, 3\); expected \[B, S, D\] with D=7"),
    "rank": (lambda: PLAIN.prepare(Memory(OUT[0])), r"memory.out has shape \(6, 7\), 2-D; expected \[B, S, D\]"),
    "mask shape": (lambda: PLAIN.prepare(Memory(OUT, MASK.T)), r"memory.mask has shape \(6, 3\).*~key_padding_mask"),
    "query size": (lambda: PLAIN(torch.zeros(B, 4), KEYS), r"query has Q=4 features"),
    "rows": (lambda: PLAIN(torch.zeros(4, Q), KEYS), r"N=4 rows, the keys have B=3; N must be a multiple of B"),
}
TYPES: dict[str, tuple[Callable[[], Any], str]] = {
    "a tensor": (lambda: PLAIN.prepare(OUT), r"memory must be a fastseq.Memory, got Tensor; use Memory\(out, mask\)"),
    "float mask": (
        lambda: PLAIN.prepare(Memory(OUT, MASK.float())),
        r"torch.float32.*True = attend.*~key_padding_mask",
    ),
    "memory as keys": (lambda: PLAIN(torch.zeros(B, Q), Memory(OUT)), r"keys must be of type Keys.*Attention.prepare"),
    "a number as window": (lambda: Attention(4, 5, window=2), r"window must be a LocalP, got int; use LocalP\(D\)"),
    "query": (lambda: PLAIN([0.0], KEYS), r"query must be a torch.Tensor, got list"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str) -> None:
    call, message = FAULTS[name]
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("name", TYPES)
def test_wrong_types(name: str) -> None:
    call, message = TYPES[name]
    with pytest.raises(TypeError, match=message):
        call()

"""Small sequence-to-sequence models whose searches have clear winners, and searches of them to compare with."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from fastseq import Decoder, GenerateOutput, Memory, Seq2Seq
from fastseq.backends import decoder_cpu

__all__ = [
    "BOS",
    "EOS",
    "OPTIONS",
    "PAD",
    "PRESETS",
    "Recall",
    "in_float64",
    "log_likelihood",
    "model",
    "native_searches",
    "same",
]

PAD, BOS, EOS = 0, 1, 2
B, S, H, WIDTH = 4, 5, 12, 6

# Every preset with cells that the native loop runs; of the others, tests say that they do not.
PRESETS: list[tuple[str, dict[str, Any]]] = [
    ("sutskever", {}),
    ("sutskever", {"num_layers": 3, "cell": "gru"}),
    ("cho", {}),
    ("cho", {"context_side": "input", "cell": "lstm", "bridge": fastseq.Bridge("top", act="tanh", cell="zero")}),
    ("bahdanau", {}),
    ("bahdanau", {"cell": "lstm"}),
    ("bahdanau", {"cell": "gru", "num_layers": 2, "context_to": "all"}),
    ("luong", {}),
    ("luong", {"cell": "gru", "num_layers": 2}),
    ("luong", {"feed": None, "attention": "dot", "cell": "gru_reset_before"}),
    ("opennmt", {"attention": "additive"}),
    ("fairseq", {"cell": "gru_reset_before"}),
    ("joeynmt", {"num_layers": 2}),
    ("tf_nmt", {}),
    ("gnmt", {"num_layers": 2}),
    ("gnmt", {"num_layers": 3, "residual": None, "cell": "gru"}),
    ("conditional_gru", {}),
    ("conditional_gru", {"cell": "lstm"}),
    ("bentrevett", {}),
    ("bentrevett", {"combine": "maxout", "feed": "context", "cell": "lstm"}),
]

# Of searches, beside their beams.
OPTIONS: list[dict[str, Any]] = [
    {"min_new_tokens": 5},
    {"decoder_input_ids": [[5, 6], [7, 8], [8, 3], [4, 4]]},
    {"decoder_input_ids": [[BOS, 5], [BOS, 8], [BOS, 3], [BOS, 4]], "min_new_tokens": 2},
    {"length_penalty": 0.0},
    {"length_penalty": 2.0},
    {"length_penalty": -1.0},
    {"length_penalty": 0.6, "length_norm": "wu"},
]


class Recall(nn.Module):
    """An encoder that knows its memories: src [B, 1] names them, and lengths nothing."""

    def __init__(self, decoder: Decoder, rows: int = B, source: int = S) -> None:
        super().__init__()
        bridge = decoder.bridge.bridge  # type: ignore[union-attr]
        features = decoder.memory_size or H
        size = features if decoder.summary is not None else decoder.bridge.size * (1 + bridge.half)  # type: ignore[operator]
        count = len(bridge.layers or range(decoder.num_layers))
        self.out = nn.Parameter(torch.randn(rows, source, features))
        self.h = nn.ParameterList(torch.randn(rows, size) for _ in range(count))
        self.c = nn.ParameterList(torch.randn(rows, size) for _ in range(count if decoder.spec.cell == "lstm" else 0))
        self.register_buffer("mask", torch.rand(rows, source) < 0.8)

    def forward(self, src: Tensor, lengths: Any = None) -> Memory:
        rows, leaves = src[:, 0], (self.h, self.c) if len(self.c) else (self.h,)
        state = tuple(tuple(leaf[rows] for leaf in layer) for layer in zip(*leaves, strict=True))
        mask: Tensor = self.mask  # type: ignore[assignment]
        return Memory(self.out[rows], mask[rows], state)


def model(
    name: str = "luong", V: int = 11, seed: int = 0, sharpness: float = 2.0, rows: int = B, **options: Any
) -> Seq2Seq:
    """Seq2Seq.eval() on a Recall; `sharpness` times the usual weights."""
    torch.manual_seed(seed)
    sizes = {} if name == "sutskever" else {"memory_size": H}
    decoder = getattr(Decoder, name)(WIDTH, H, **(sizes | options))
    made = Seq2Seq(Recall(decoder, rows), decoder, V, bos_id=BOS, eos_id=EOS, pad_id=PAD)
    with torch.no_grad():
        for parameter in (*decoder.parameters(), *made.output.parameters()):
            parameter.mul_(sharpness)
    return made.eval()


def in_float64(of: Seq2Seq, src: Tensor, **options: Any) -> GenerateOutput:
    """The same search by a copy in float64, which steps through plain PyTorch."""
    return copy.deepcopy(of).double().generate(src, **options)


def same(found: GenerateOutput, expected: GenerateOutput) -> None:
    """Equal tokens and lengths; scores and weights of fp32."""
    assert found.sequences.equal(expected.sequences)
    assert found.lengths.equal(expected.lengths)
    torch.testing.assert_close(found.scores, expected.scores.float(), rtol=2e-5, atol=2e-5)
    assert (found.weights is None) == (expected.weights is None)
    if found.weights is not None and expected.weights is not None:
        torch.testing.assert_close(found.weights, expected.weights.float(), rtol=1e-4, atol=2e-5)


def log_likelihood(of: Seq2Seq, src: Tensor, found: GenerateOutput, forced: int = 0) -> tuple[Tensor, Tensor | None]:
    """[B, R] of each hypothesis' new tokens by teacher forcing, in float64; the attention's weights [B, R, L, S]."""
    twin = copy.deepcopy(of).double()
    rows, beams, most = found.sequences.shape
    tokens = found.sequences.flatten(0, 1)
    fed = torch.cat((torch.full((len(tokens), 1), BOS), tokens[:, :-1]), 1)
    with torch.no_grad():
        logits, weights = twin(src.repeat_interleave(beams, 0), fed, need_weights=of.decoder.attention is not None)
    each = logits.log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]
    places = torch.arange(most)
    there = (places >= forced) & (places < found.lengths.flatten()[:, None])
    total = torch.where(there, each, 0).sum(1).view(rows, beams)
    return total, None if weights is None else weights.unflatten(0, (rows, beams))


def native_searches(monkeypatch: Any) -> list[int]:
    """A list that grows by one with each search that runs natively."""
    calls: list[int] = []
    search = decoder_cpu.decoder_search

    def counted(*args: Any) -> Any:
        calls.append(1)
        return search(*args)

    monkeypatch.setattr(decoder_cpu, "decoder_search", counted)
    return calls

"""Decoders of OpenNMT-py and fairseq by their modules' names, attributes and signatures, written from their formulas.

Neither toolkit installs beside current PyTorch. `accelerate` goes by the class's module and name and by its parts, so
these classes stand where theirs would.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, softmax

__all__ = ["fairseq_decoder", "opennmt_decoder"]


class StackedLSTM(nn.Module):
    """Cells, with a dropout between them."""

    kind: type[nn.Module] = nn.LSTMCell

    def __init__(self, num_layers: int, input_size: int, rnn_size: int, p: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)
        self.layers = nn.ModuleList(
            self.kind(input_size if index == 0 else rnn_size, rnn_size) for index in range(num_layers)
        )

    def forward(self, x: Tensor, hidden: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        states = []
        for index, cell in enumerate(self.layers):
            if index:
                x = self.dropout(x)
            given = tuple(leaf[index] for leaf in hidden)
            made = cell(x, given if len(given) == 2 else given[0])
            states.append(made if isinstance(made, tuple) else (made,))
            x = states[-1][0]
        return x, tuple(torch.stack(leaf) for leaf in zip(*states, strict=True))


class StackedGRU(StackedLSTM):
    kind = nn.GRUCell


class GlobalAttention(nn.Module):
    def __init__(self, dim: int, attn_type: str, attn_func: str = "softmax") -> None:
        super().__init__()
        self.dim, self.attn_type, self.attn_func = dim, attn_type, attn_func
        if attn_type == "general":
            self.linear_in = nn.Linear(dim, dim, bias=False)
        if attn_type == "mlp":
            self.linear_context, self.linear_query = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
            self.v = nn.Linear(dim, 1, bias=False)
        self.linear_out = nn.Linear(2 * dim, dim, bias=attn_type == "mlp")

    def forward(self, query: Tensor, bank: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """query [B, H], bank [B, S, H]."""
        if self.attn_type == "mlp":
            scores = self.v(torch.tanh(self.linear_query(query)[:, None] + self.linear_context(bank)))[..., 0]
        else:
            q = self.linear_in(query) if self.attn_type == "general" else query
            scores = torch.einsum("bsh,bh->bs", bank, q)
        if lengths is not None:
            scores = scores.masked_fill(torch.arange(bank.shape[1]) >= lengths[:, None], -torch.inf)
        align = softmax(scores, 1)
        out = self.linear_out(torch.cat((torch.einsum("bs,bsh->bh", align, bank), query), 1))
        return out if self.attn_type == "mlp" else out.tanh(), align


class InputFeedRNNDecoder(nn.Module):
    """Time first, as versions 1 and 2 are."""

    def __init__(
        self, embeddings: nn.Module, features: int, size: int, num_layers: int, cell: str, score: str, p: float
    ):
        super().__init__()
        self.embeddings, self.dropout, self.state = embeddings, nn.Dropout(p), {}
        self.rnn = {"lstm": StackedLSTM, "gru": StackedGRU}[cell](num_layers, features + size, size, p)
        self.attn: Any = GlobalAttention(size, score)
        self.context_gate, self.copy_attn, self._coverage, self._reuse_copy_attn = None, None, False, False

    def init_state(self, hidden: tuple[Tensor, ...]) -> None:
        self.state = {"hidden": hidden, "input_feed": torch.zeros_like(hidden[0][:1]), "coverage": None}

    def forward(self, tgt: Tensor, memory_bank: Tensor, memory_lengths: Tensor | None = None, step: Any = None) -> Any:
        """(outputs [T, B, H], {"std": [T, B, S]}) of tgt [T, B] and memory_bank [S, B, H]."""
        hidden, outs, attns = self._run_forward_pass(tgt, memory_bank, memory_lengths=memory_lengths)
        self.state["hidden"], self.state["input_feed"] = hidden, outs[-1][None]
        if isinstance(outs, list):
            outs, attns = torch.stack(outs), {name: torch.stack(found) for name, found in attns.items()}
        return outs, attns

    def _run_forward_pass(self, tgt: Tensor, memory_bank: Tensor, memory_lengths: Tensor | None = None) -> Any:
        return self._loop(self.embeddings(tgt).unbind(0), memory_bank.transpose(0, 1), memory_lengths)

    def _loop(self, embedded: Any, bank: Tensor, lengths: Tensor | None) -> Any:
        hidden, feed, outs, aligned = self.state["hidden"], self.state["input_feed"][0], [], []
        for emb in embedded:
            query, hidden = self.rnn(torch.cat((emb, feed), 1), hidden)
            feed, align = self.attn(query, bank, lengths)
            feed = self.dropout(feed)
            outs.append(feed)
            aligned.append(align)
        return hidden, outs, {"std": aligned}


class BatchFirst(InputFeedRNNDecoder):
    """Version 3."""

    def forward(self, tgt: Tensor, enc_out: Tensor, src_len: Tensor | None = None, step: Any = None) -> Any:
        """(outputs [B, T, H], {"std": [T, B, S]}) of tgt [B, T] and enc_out [B, S, H]."""
        hidden, outs, attns = self._run_forward_pass(tgt, enc_out, src_len=src_len)
        self.state["hidden"] = hidden
        if isinstance(outs, list):
            outs, attns = torch.stack(outs, 1), {name: torch.stack(found) for name, found in attns.items()}
        self.state["input_feed"] = outs[:, -1][None]
        return outs, attns

    def _run_forward_pass(self, tgt: Tensor, enc_out: Tensor, src_len: Tensor | None = None) -> Any:
        return self._loop(self.embeddings(tgt).unbind(1), enc_out, src_len)


class FairseqDropout(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.apply_during_inference = p, False

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, True) if self.p and (self.training or self.apply_during_inference) else x


class AttentionLayer(nn.Module):
    def __init__(self, size: int, features: int) -> None:
        super().__init__()
        self.input_proj = nn.Linear(size, features, bias=False)
        self.output_proj = nn.Linear(size + features, size, bias=False)

    def forward(self, x: Tensor, outs: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("sbd,bd->sb", outs, self.input_proj(x))
        if padding is not None:
            scores = scores.masked_fill(padding, -torch.inf)
        scores = softmax(scores, 0)
        return torch.tanh(self.output_proj(torch.cat((torch.einsum("sb,sbd->bd", scores, outs), x), 1))), scores


class LSTMDecoder(nn.Module):
    def __init__(self, embedding: nn.Embedding, size: int, features: int, num_layers: int, p: float, extra: int | None):
        super().__init__()
        self.embed_tokens, self.encoder_output_units, self.residuals, self.need_attn = embedding, features, False, True
        self.dropout_in_module, self.dropout_out_module = FairseqDropout(p), FairseqDropout(p)
        reads = [embedding.embedding_dim + size] + [size] * (num_layers - 1)
        self.layers = nn.ModuleList(nn.LSTMCell(n, size) for n in reads)
        projected = features != size
        self.encoder_hidden_proj = nn.Linear(features, size) if projected else None
        self.encoder_cell_proj = nn.Linear(features, size) if projected else None
        self.attention: Any = AttentionLayer(size, features)
        self.adaptive_softmax = None
        if extra is not None:
            self.additional_fc = nn.Linear(size, extra)
        self.fc_out = nn.Linear(extra or size, embedding.num_embeddings)

    def forward(self, prev_output_tokens: Tensor, encoder_out: Any = None, incremental_state: Any = None) -> Any:
        x, weights = self.extract_features(prev_output_tokens, encoder_out, incremental_state)
        return self.fc_out(x), weights

    def extract_features(
        self, prev_output_tokens: Tensor, encoder_out: Any = None, incremental_state: Any = None
    ) -> Any:
        outs, h, c, padding = encoder_out
        if incremental_state:
            prev_output_tokens = prev_output_tokens[:, -1:]
        embedded = self.dropout_in_module(self.embed_tokens(prev_output_tokens))
        if incremental_state:
            h, c, feed = incremental_state["state"]
        else:
            if self.encoder_hidden_proj is not None:
                h, c = self.encoder_hidden_proj(h), self.encoder_cell_proj(c)
            feed = torch.zeros_like(h[0])
        h, c, made, seen = list(h), list(c), [], []
        for x in embedded.unbind(1):
            below = torch.cat((x, feed), 1)
            for index, cell in enumerate(self.layers):
                h[index], c[index] = cell(below, (h[index], c[index]))
                below = self.dropout_out_module(h[index])
            out, align = self.attention(h[-1], outs, padding)
            feed = self.dropout_out_module(out)
            made.append(feed)
            seen.append(align.T)
        if incremental_state is not None:
            incremental_state["state"] = torch.stack(h), torch.stack(c), feed
        x = torch.stack(made, 1)
        if hasattr(self, "additional_fc"):
            x = self.dropout_out_module(self.additional_fc(x))
        return x, torch.stack(seen, 1) if self.need_attn and not self.training else None


for module, kinds in (
    ("onmt.modules.stacked_rnn", (StackedLSTM, StackedGRU)),
    ("onmt.modules.global_attention", (GlobalAttention,)),
    ("onmt.decoders.decoder", (InputFeedRNNDecoder, BatchFirst)),
    ("fairseq.models.lstm", (LSTMDecoder, AttentionLayer)),
    ("fairseq.modules.fairseq_dropout", (FairseqDropout,)),
):
    for kind in kinds:
        kind.__module__ = module
BatchFirst.__qualname__ = "InputFeedRNNDecoder"


def opennmt_decoder(
    version: int = 1, cell: str = "lstm", score: str = "general", layers: int = 2, p: float = 0.0
) -> Any:
    """Of 6 features embedded, 8 units and 13 tokens."""
    kind = InputFeedRNNDecoder if version == 1 else BatchFirst
    return kind(nn.Embedding(13, 6), 6, 8, layers, cell, score, p)


def fairseq_decoder(features: int = 8, layers: int = 2, p: float = 0.0, extra: int | None = None) -> Any:
    """Of 6 features embedded, 8 units and 13 tokens."""
    return LSTMDecoder(nn.Embedding(13, 6), 8, features, layers, p, extra)

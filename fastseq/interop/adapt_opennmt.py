"""OpenNMT-py's InputFeedRNNDecoder, all steps as one operator."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import attention_decoder
from ..spec import AttentionParams, DecoderParams, DecoderSpec, DropoutMasks, Keys
from .adapters import CELLS, Adapter, Draws, cell_params, cells_differ, first_state, last_state, obstacle, own

__all__ = ["Decoder"]

STACKS = ("StackedLSTM", "StackedGRU")


class Decoder(Adapter):
    """OpenNMT-py's InputFeedRNNDecoder; `forward` is theirs, its loop over the steps is ours."""

    rnn: Any
    attn: Any
    dropout: Any
    embeddings: Any
    state: dict[str, Any]

    def obstacle(self) -> str | None:
        attn, rnn = self.attn, self.rnn
        if type(rnn).__name__ not in STACKS or not type(rnn).__module__.startswith("onmt."):
            return f"rnn is a {type(rnn).__module__}.{type(rnn).__qualname__}, not one of {', '.join(STACKS)}"
        if attn is None or type(attn).__name__ != "GlobalAttention":
            return "it has no GlobalAttention"
        for name, given in (
            ("coverage_attn", self._coverage), ("copy_attn", self.copy_attn is not None or self._reuse_copy_attn),
            ("context_gate", self.context_gate is not None),
            (f"attn_func={attn.attn_func!r}", attn.attn_func != "softmax"),
        ):  # fmt: skip
            if given:
                return f"{name} is not supported"
        linears = {f"attn.{name}": part for name, part in attn.named_children()}
        return obstacle(
            own("rnn", rnn, type(rnn)), own("attn", attn, type(attn)), own("dropout", self.dropout, nn.Dropout),
            own("rnn.dropout", rnn.dropout, nn.Dropout),
            cells_differ("rnn.layers", rnn.layers),
            *(own(name, part, nn.Linear) for name, part in linears.items()),
        )  # fmt: skip

    def _run_forward_pass(self, tgt: Tensor, memory_bank: Tensor, **lengths: Tensor | None) -> Any:
        """(the state, outputs, {"std": weights [T, B, S]}) as theirs, whose steps these are.

        Version 3 is batch first and calls the lengths src_len, those before are time first: memory_lengths.
        """
        if (why := self.obstacle()) is not None:
            warnings.warn(f"OpenNMT-py's decoder steps from Python again: {why}", stacklevel=2)
            return super()._run_forward_pass(tgt, memory_bank, **lengths)  # type: ignore[misc]
        (kind, ends), emb = next(iter(lengths.items()), ("memory_lengths", None)), self.embeddings(tgt)
        first = kind == "src_len"
        y, memory = (emb, memory_bank) if first else (emb.transpose(0, 1), memory_bank.transpose(0, 1))
        mask = None if ends is None else torch.arange(memory.shape[1], device=memory.device) < ends.view(-1, 1)
        state = first_state(self.state["hidden"], 0, self.state["input_feed"][0])
        cell = CELLS[type(self.rnn.layers[0])]
        keys, score = self._score(memory, mask)
        readout = self.attn.linear_out.weight, self.attn.linear_out.bias
        params = DecoderParams(cell_params(self.rnn.layers), None, None, score, readout)
        spec = DecoderSpec(
            cell, len(params.layers), attend="after", feed="output", combine="tanh" if score.v is None else "linear"
        )  # fmt: skip
        out, state, weights = attention_decoder(
            y, keys, state, params, spec, dropout_masks=self._draw(y), need_weights=True
        )  # fmt: skip
        assert weights is not None
        return last_state(state, 0, out), out if first else out.transpose(0, 1), {"std": weights.transpose(0, 1)}

    def _score(self, memory: Tensor, mask: Tensor | None) -> tuple[Keys, AttentionParams]:
        """GlobalAttention's: (W_in s) . m is s . (W_in^T m), and the query's bias is within the mlp's keys."""
        attn = self.attn
        if attn.attn_type == "mlp":
            keys = attn.linear_context(memory) + attn.linear_query.bias
            return Keys(keys, memory, mask), AttentionParams(attn.linear_query.weight, attn.v.weight[0])
        keys = memory @ attn.linear_in.weight if attn.attn_type == "general" else memory
        return Keys(keys, memory, mask), AttentionParams()

    def _draw(self, y: Tensor) -> DropoutMasks:
        """Each step's dropout in their order: between layers, then on the result."""
        (B, T, _), H = y.shape, self.attn.dim
        draws = Draws(T, y)
        between, last = (one.p if one.training else 0.0 for one in (self.rnn.dropout, self.dropout))
        layers = [draws.add(between, B, H) for _ in range(len(self.rnn.layers) - 1)]
        output = draws.add(last, B, H)
        draws.draw()
        return DropoutMasks(
            layers=torch.stack(layers).transpose(1, 2) if layers and between else None,  # type: ignore[arg-type]
            output=None if output is None else output.transpose(0, 1),
        )

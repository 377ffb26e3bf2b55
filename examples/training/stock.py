"""What the models from torch.nn share: an encoder, dropout drawn as fastseq draws it, and fastseq's parameter names."""

import copy
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq


class Encoder(nn.Module):
    """The layers of a fastseq.Encoder from torch.nn; rows of different lengths are packed."""

    def __init__(self, model: fastseq.Encoder) -> None:
        super().__init__()
        kind = {"lstm": nn.LSTM, "gru": nn.GRU}[model.cell]
        self.dropout, self.embedding = model.dropout, copy.deepcopy(model.embedding)
        self.layers = nn.ModuleList(
            kind(layer.input_size, layer.hidden_size, batch_first=True, bidirectional=layer.bidirectional)
            for layer in model.layers
        )

    def forward(
        self,
        source: Tensor,  # [B, S]
        length: Tensor | None,  # [B]; None: all S
    ) -> tuple[Tensor, Tensor | None, list[Any]]:
        """(output [B, S, D], mask [B, S] or None, each layer's last state as torch.nn gives it)."""
        out, states = _packed(self.embedding(source), length), []
        for index, layer in enumerate(self.layers):
            if index and self.dropout:  # contiguous: it is drawn in the order of memory, as fastseq's is
                out = _packed(F.dropout(_padded(out).contiguous(), self.dropout, self.training), length)
            out, state = layer(out)
            states.append(state)
        mask = None if length is None else torch.arange(source.shape[1]) < length[:, None]
        return _padded(out), mask, states


def _packed(out: Tensor, length: Tensor | None) -> Any:
    return out if length is None else pack_padded_sequence(out, length, batch_first=True, enforce_sorted=False)


def _padded(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else pad_packed_sequence(out, batch_first=True)[0]


def between(y: Tensor, layers: int, size: int, p: float, training: bool) -> Tensor | None:
    """Factors [layers - 1, B, T, size] of dropout between a decoder's layers, in one draw as fastseq's; or None."""
    if layers == 1 or not p or not training:
        return None
    return F.dropout(y.new_ones(layers - 1, *y.shape[:2], size), p)


OTHERS = {"keys.weight": "attention.weight_memory", "query.weight": "attention.weight_query", "v": "attention.v"}


def name_as_fastseq(decoder: nn.Module) -> None:
    """Let a decoder's state_dict and load_state_dict use fastseq.Decoder's names.

    Its own are layers.N, torch.nn's LSTM or GRU of one layer, or cells.N; keys and query, the attention's nn.Linear,
    and v.
    """
    decoder.register_state_dict_post_hook(_outward)
    decoder.register_load_state_dict_pre_hook(_inward)


def _outward(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        own = name[len(prefix) :]
        flat = re.sub(r"^(?:layers|cells)\.(\d+)\.(weight_[ih]h|bias_[ih]h)(?:_l0)?$", r"\2_l\1", own)
        state[prefix + OTHERS.get(own, flat)] = state.pop(name)


def _inward(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    others = {theirs: own for own, theirs in OTHERS.items()}
    nested = r"layers.\2.\1_l0" if hasattr(module, "layers") else r"cells.\2.\1"
    for name in [name for name in state if name.startswith(prefix)]:
        theirs = name[len(prefix) :]
        own = re.sub(r"^(\w+)_l(\d+)$", nested, theirs)
        state[prefix + others.get(theirs, own)] = state.pop(name)

"""JoeyNMT's RecurrentEncoder and RecurrentDecoder, all steps as one operator."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import attention_decoder
from ..modules import GRU, LSTM
from ..spec import AttentionParams, DecoderParams, DecoderSpec, DecoderState, DropoutMasks, Keys
from .adapters import LAYERS, Adapter, Draws, first_state, last_state, layer_params, obstacle, own, rnn_differs

__all__ = ["Decoder", "Encoder"]

PROJECTIONS = {  # of JoeyNMT's attentions, beside that of the keys, which runs as theirs
    "joeynmt.attention.BahdanauAttention": ("query_layer", "energy_layer"),
    "joeynmt.attention.LuongAttention": (),
}


class Encoder(Adapter):
    """JoeyNMT's RecurrentEncoder without packing: rows in any order, and of one direction too."""

    rnn: Any
    emb_dropout: Any

    def obstacle(self) -> str | None:
        return rnn_differs("rnn", self.rnn)

    def forward(self, src_embed: Tensor, src_length: Tensor, mask: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As JoeyNMT's: (output [B, S, dirs * H], the top layer's last h [B, dirs * H])."""
        rnn = self.rnn
        drops = rnn.training and rnn.dropout > 0 and rnn.num_layers > 1
        if drops or type(rnn) not in (LSTM, GRU):  # what is drawn between layers is drawn for packed rows
            found: tuple[Tensor, Tensor] = super().forward(src_embed, src_length, mask, **kwargs)
            return found
        self._check_shapes_input_forward(src_embed=src_embed, src_length=src_length, mask=mask)  # type: ignore[operator]
        output, hidden = rnn(self.emb_dropout(src_embed), lengths=src_length)
        h = hidden[0] if isinstance(hidden, tuple) else hidden
        return output, torch.cat(h[-2:].unbind(0) if rnn.bidirectional else h[-1:].unbind(0), 1)


class Decoder(Adapter):
    """JoeyNMT's RecurrentDecoder: every teacher-forced step, or the one of a search, in one operator."""

    rnn: Any
    attention: Any
    att_vector_layer: Any
    emb_dropout: Any
    hidden_dropout: Any
    input_feeding: bool

    def obstacle(self) -> str | None:
        attention = self.attention
        kind = f"{type(attention).__module__}.{type(attention).__qualname__}"
        if kind not in PROJECTIONS:
            return f"attention is a {kind}, not JoeyNMT's"
        if getattr(self, "activation", torch.tanh) is not torch.tanh:  # version 1 has no other
            return "activation is not tanh"
        return obstacle(
            rnn_differs("rnn", self.rnn), "rnn is bidirectional" if self.rnn.bidirectional else None,
            own("attention", attention, type(attention)), own("att_vector_layer", self.att_vector_layer, nn.Linear),
            None if self.att_vector_layer.bias is not None else "att_vector_layer has no bias",
            own("emb_dropout", self.emb_dropout, nn.Dropout), own("hidden_dropout", self.hidden_dropout, nn.Dropout),
            *(own(f"attention.{name}", getattr(attention, name), nn.Linear) for name in PROJECTIONS[kind]),
        )  # fmt: skip

    def forward(
        self,
        trg_embed: Tensor,  # [B, T, E]
        encoder_output: Tensor,  # [B, S, D]
        encoder_hidden: Tensor | None,  # [B, D]
        src_mask: Tensor,  # [B, 1, S], True or 1 = attend
        unroll_steps: int,
        hidden: Any = None,  # [B, L, H], of an LSTM a pair
        prev_att_vector: Tensor | None = None,  # [B, 1, H]
        **kwargs: Any,
    ) -> tuple[Tensor, Any, Tensor, Tensor]:
        """As JoeyNMT's: (logits [B, T, V], hidden, attention's weights [B, T, S], attention's vectors [B, T, H])."""
        if (why := self.obstacle()) is not None:
            warnings.warn(f"JoeyNMT's decoder steps from Python again: {why}", stacklevel=2)
            found: Any = super().forward(
                trg_embed, encoder_output, encoder_hidden, src_mask, unroll_steps, hidden, prev_att_vector, **kwargs
            )
            return found
        y, mask = trg_embed[:, :unroll_steps], src_mask[:, 0]
        self.attention.compute_proj_keys(keys=encoder_output)
        keys = Keys(self.attention.proj_keys, encoder_output, mask if mask.dtype == torch.bool else mask > 0)
        state = self._first(encoder_hidden, hidden, prev_att_vector)
        params, (masks, begin) = self._params(), self._draw(y, encoder_output)
        if begin is not None:
            params, state = _twice(params, state, y.shape[2], begin)
        spec = DecoderSpec(
            LAYERS[type(self.rnn)], len(params.layers), attend="after", feed="output" if self.input_feeding else None,
            readout=("state", "context"), combine="tanh",
        )  # fmt: skip
        out, state, weights = attention_decoder(
            y, keys, state, params, spec, dropout_masks=masks, need_weights=True
        )  # fmt: skip
        assert weights is not None
        vectors = out[..., : self.att_vector_layer.out_features]
        leaves = last_state(state, 1, out)
        logits: Tensor = self.output_layer(vectors)  # type: ignore[operator]
        return logits, leaves if len(leaves) == 2 else leaves[0], weights, vectors

    def _first(self, encoder_hidden: Tensor | None, hidden: Any, fed: Tensor | None) -> DecoderState:
        """What the first step starts from: of the encoder, or of the step before."""
        begins = hidden is None
        hidden = self._init_hidden(encoder_hidden) if begins else hidden  # type: ignore[operator]
        leaves = hidden if isinstance(hidden, tuple) else (hidden,)
        state = first_state(leaves, 0 if begins else 1, None if fed is None else fed[:, 0])
        if not self.input_feeding:
            return state._replace(feed=None)
        return state if fed is not None else state._replace(feed=torch.zeros_like(state.layers[0][0]))

    def _params(self) -> DecoderParams:
        attention, readout = self.attention, self.att_vector_layer
        score = AttentionParams()
        if hasattr(attention, "energy_layer"):
            score = AttentionParams(attention.query_layer.weight, attention.energy_layer.weight[0])
        return DecoderParams(layer_params(self.rnn), None, None, score, (readout.weight, readout.bias))

    def _draw(self, y: Tensor, memory: Tensor) -> tuple[DropoutMasks, Tensor | None]:
        """Each step's dropout in JoeyNMT's order: on [y; fed], between layers, on [state; context].

        Also what multiplies the fed part as the first step reads it, where that has a dropout.
        """
        (B, T, E), rnn, H = y.shape, self.rnn, self.rnn.hidden_size
        draws, fed = Draws(T, y), H if self.input_feeding else 0
        between = rnn.dropout if rnn.training else 0.0
        read = draws.add(_p(self.emb_dropout), B, E + fed)
        layers = [draws.add(between, B, H) for _ in range(rnn.num_layers - 1)]
        readout = draws.add(_p(self.hidden_dropout), B, H + memory.shape[2])
        draws.draw()
        input, output, begin = None, None, None
        if read is not None:
            input = read[..., :E].transpose(0, 1)
        if read is not None and fed:  # what a step reads of the fed part is given by the step before, beside its result
            begin, whole = read[0, :, E:], torch.ones_like(read[:1, :, E:])
            later = torch.cat((read[1:, :, E:], whole))
            output = torch.cat((whole.expand_as(later), later), 2).transpose(0, 1)
        masks = DropoutMasks(
            input, torch.stack(layers).transpose(1, 2) if layers and between else None,  # type: ignore[arg-type]
            None if readout is None else readout.transpose(0, 1), output,
        )  # fmt: skip
        return masks, begin


def _twice(params: DecoderParams, state: DecoderState, E: int, begin: Tensor) -> tuple[DecoderParams, DecoderState]:
    """The same decoder with its result twice, of which the second is dropped out, fed and read.

    A decoder feeds back what it gives, but JoeyNMT's dropout is on what is read of it alone.
    """
    assert state.feed is not None
    (w_ih, w_hh, b_ih, b_hh), *upper = params.layers
    first = torch.cat((w_ih[:, :E], torch.zeros_like(w_ih[:, E:]), w_ih[:, E:]), 1), w_hh, b_ih, b_hh
    weight, bias = (torch.cat((t, t)) for t in params.readout)  # type: ignore[union-attr, arg-type]
    twice = params._replace(layers=(first, *upper), readout=(weight, bias))
    return twice, state._replace(feed=torch.cat((state.feed, state.feed * begin), 1))


def _p(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0

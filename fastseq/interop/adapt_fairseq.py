"""fairseq's LSTMDecoder, all teacher-forced steps as one operator."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import attention_decoder
from ..spec import AttentionParams, DecoderParams, DecoderSpec, DropoutMasks, Keys
from .adapters import Adapter, Draws, cell_params, cells_differ, first_state, obstacle, own

__all__ = ["Decoder"]

SPEC = {"attend": "after", "feed": "output", "combine": "tanh"}


class Decoder(Adapter):
    """fairseq's LSTMDecoder; its incremental generation stays fairseq's own."""

    layers: Any
    attention: Any
    dropout_in_module: Any
    dropout_out_module: Any
    encoder_hidden_proj: Any
    encoder_cell_proj: Any
    embed_tokens: Any

    def obstacle(self) -> str | None:
        attention, dropout = self.attention, self.dropout_out_module
        for name, given in (
            ("residuals", self.residuals), ("a decoder without attention", attention is None),
            ("adaptive softmax", self.adaptive_softmax is not None),
            ("a decoder without encoder", not self.encoder_output_units),
            ("dropout during inference", dropout.apply_during_inference),
        ):  # fmt: skip
            if given:
                return f"{name} is not supported"
        if type(attention).__name__ != "AttentionLayer":
            return f"attention is a {type(attention).__module__}.{type(attention).__qualname__}, not AttentionLayer"
        return obstacle(
            own("attention", attention, type(attention)),
            own("attention.input_proj", attention.input_proj, nn.Linear),
            own("attention.output_proj", attention.output_proj, nn.Linear),
            "attention.input_proj has a bias" if attention.input_proj.bias is not None else None,
            own("dropout_out_module", dropout, type(dropout)),
            cells_differ("layers", self.layers),
        )

    def extract_features(
        self,
        prev_output_tokens: Tensor,  # [B, T]
        encoder_out: Any = None,  # outs [S, B, D], hiddens and cells [L, B, D], padding mask [S, B]
        incremental_state: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As fairseq's: (features [B, T, H], weights [B, T, S] in eval mode where they are asked for)."""
        why = self.obstacle()
        if why is not None:
            warnings.warn(f"fairseq's decoder steps from Python again: {why}", stacklevel=2)
        if why is not None or incremental_state is not None or encoder_out is None:
            found: Any = super().extract_features(prev_output_tokens, encoder_out, incremental_state)  # type: ignore[misc]
            return found
        outs, hiddens, cells, padding = encoder_out[:4]
        y, memory = self.dropout_in_module(self.embed_tokens(prev_output_tokens)), outs.transpose(0, 1)
        if self.encoder_hidden_proj is not None:
            hiddens, cells = self.encoder_hidden_proj(hiddens), self.encoder_cell_proj(cells)
        state = first_state((hiddens, cells), 0, torch.zeros_like(hiddens[0]))
        attention = self.attention  # (W q) . m is q . (W^T m): the key is projected
        keys = Keys(memory @ attention.input_proj.weight, memory, None if padding is None else ~padding.bool().t())
        readout = attention.output_proj.weight, attention.output_proj.bias
        params = DecoderParams(cell_params(self.layers), None, None, AttentionParams(), readout)
        need = not self.training and bool(self.need_attn)
        x, _, weights = attention_decoder(
            y, keys, state, params, DecoderSpec("lstm", len(self.layers), **SPEC),  # type: ignore[arg-type]
            dropout_masks=self._draw(y), need_weights=need,
        )  # fmt: skip
        if hasattr(self, "additional_fc"):
            x = self.dropout_out_module(self.additional_fc(x))  # type: ignore[operator]
        return x, weights

    def _draw(self, y: Tensor) -> DropoutMasks:
        """Each step's dropout in fairseq's order: on every layer's state, the last one's unused, then on the result."""
        (B, T, _), H = y.shape, self.layers[0].hidden_size
        draws = Draws(T, y)
        p = self.dropout_out_module.p if self.dropout_out_module.training else 0.0
        states = [draws.add(p, B, H) for _ in self.layers]
        output = draws.add(p, B, H)
        draws.draw()
        if output is None:
            return DropoutMasks()
        between = torch.stack(states[:-1]).transpose(1, 2) if states[:-1] else None  # type: ignore[arg-type]
        return DropoutMasks(layers=between, output=output.transpose(0, 1))

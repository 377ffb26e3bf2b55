"""Whole models of OpenNMT-py and fairseq in plain PyTorch, with the keys of their checkpoints, from source to logits.

Their decoders are those of `toolkits`; here are the encoders, embeddings and output layers around them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq.spec import DropoutMasks, Memory
from tests.toolkits import Fairseq, OpenNMT, Sizes

__all__ = ["FairseqModel", "OpenNMTModel", "Row", "drawn"]

NO_MASKS = DropoutMasks()
RNNS = {"lstm": nn.LSTM, "gru": nn.GRU}


def encoded(rnn: nn.Module, emb: Tensor, lengths: Tensor) -> Memory:
    """torch's layers over packed rows [B, S, E], whose directions lie side by side."""
    packed = pack_padded_sequence(emb, lengths, batch_first=True, enforce_sorted=False)
    out, last = rnn(packed)
    leaves, dirs = last if isinstance(last, tuple) else (last,), 2 if rnn.bidirectional else 1
    sides = [torch.cat([leaf[side::dirs] for side in range(dirs)], 2) for leaf in leaves]  # each [L, B, dirs * H]
    mask = torch.arange(emb.shape[1]) < lengths[:, None]
    out, _ = pad_packed_sequence(out, batch_first=True, total_length=emb.shape[1])
    return Memory(out, mask, tuple(zip(*sides, strict=True)))


class OpenNMTModel(nn.Module):
    """NMTModel of RNNEncoder and a recurrent decoder; `decoder_only` is `toolkits.OpenNMT`, which holds the bridge."""

    def __init__(self, sizes: Sizes, vocabularies: tuple[int, int], cell: str = "lstm", dirs: int = 2, **options: Any):
        super().__init__()
        n = sizes
        self.source, self.target = (nn.Embedding(rows, n.I) for rows in vocabularies)
        self.rnn = RNNS[cell](n.I, n.H // dirs, n.L, bidirectional=dirs == 2, batch_first=True)
        self.decoder = OpenNMT(n, cell, dirs=dirs, **options)
        self.generator = nn.Linear(n.H, vocabularies[1])

    def forward(self, src: Tensor, tgt: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        memory = encoded(self.rnn, self.source(src), lengths)
        found = self.decoder(self.target(tgt), memory, NO_MASKS)
        return self.generator(found["out"]), found.get("weights")

    def checkpoint(self, version: int = 1) -> dict[str, dict[str, Tensor]]:
        """ "model" and "generator", as versions 1 and 3 store them."""
        names = {"source": "encoder.embeddings.make_embedding.emb_luts.0", "rnn": "encoder.rnn",
                 "target": "decoder.embeddings.make_embedding.emb_luts.0"}  # fmt: skip
        model = {}
        for name, value in self.state_dict().items():
            part, rest = name.split(".", 1)
            if part != "generator":
                bridge = name.startswith("decoder.bridge.")
                model[f"encoder.{rest}" if bridge else f"{names.get(part, part)}.{rest}"] = value
        prefix = "0." if version == 1 else ""
        return {"model": model, "generator": {f"{prefix}{k}": v for k, v in self.generator.state_dict().items()}}


class FairseqModel(nn.Module):
    """LSTMModel; sources come padded on the left and are turned, additional_fc stands before the output layer."""

    def __init__(
        self, sizes: Sizes, vocabularies: tuple[int, int], dirs: int = 2, *, pad_id: int, attention: bool = True,
        out_size: int | None = None, share: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        n = sizes
        self.pad_id, self.share = pad_id, share
        self.source, self.target = (nn.Embedding(rows, n.I) for rows in vocabularies)
        self.lstm = nn.LSTM(n.I, n.D // dirs, n.L, bidirectional=dirs == 2, batch_first=True)
        self.decoder = Fairseq(n, attention)
        self.additional_fc = None if out_size is None else nn.Linear(n.H, out_size)
        self.fc_out = None if share else nn.Linear(out_size or n.H, vocabularies[1])

    def forward(self, src: Tensor, tgt: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        turned = torch.full_like(src, self.pad_id)
        for row, given, n in zip(turned, src, lengths.tolist(), strict=True):
            row[:n] = given[len(given) - n :]
        found = self.decoder(self.target(tgt), encoded(self.lstm, self.source(turned), lengths), NO_MASKS)
        x = found["out"]
        if self.additional_fc is not None:
            x = self.additional_fc(x)
        logits = linear(x, self.target.weight) if self.fc_out is None else self.fc_out(x)
        return logits, found.get("weights")

    def checkpoint(self) -> dict[str, Tensor]:
        """The entry "model"."""
        names = {"source": "encoder.embed_tokens", "target": "decoder.embed_tokens", "lstm": "encoder.lstm",
                 "additional_fc": "decoder.additional_fc", "fc_out": "decoder.fc_out",
                 "decoder": "decoder"}  # fmt: skip
        parts = ((*name.split(".", 1), value) for name, value in self.state_dict().items())
        return {f"{names[part]}.{rest}": value for part, rest, value in parts}


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 with random values, so large that every choice of a search is clear."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.7)
    return model.eval()


class Row:
    """One source, as `generate_oracle.plain_beam` searches it: every step computes all steps before it anew."""

    def __init__(self, model: nn.Module, src: Tensor, length: int) -> None:
        self.model, self.src, self.length = model, src[None], torch.tensor([length])

    def logits(self, tokens: list[int]) -> Tensor:
        """[T, V], in float64."""
        with torch.no_grad():
            return self.model(self.src, torch.tensor([tokens]), self.length)[0][0]

    def state(self) -> list[int]:
        return []

    def step(self, tokens: Tensor, state: list[int]) -> tuple[Tensor, list[int], None]:
        fed = [*state, int(tokens)]
        return self.logits(fed)[-1:], fed, None

    def score(self, tokens: list[int], prefix: tuple[int, ...]) -> tuple[float, Tensor]:
        """Log-probability of the tokens after the prefix; weights of no one, for no penalty on them."""
        chosen = self.logits([*prefix, *tokens][:-1]).log_softmax(-1)[len(prefix) - 1 :]
        return float(chosen.gather(1, torch.tensor(tokens)[:, None]).sum()), torch.zeros(1, 1)

    mask = torch.zeros(1, 1, dtype=torch.bool)

"""Four papers' encoder-decoders as fastseq.Seq2Seq, of sizes for a small data set.

sutskever  Sutskever et al. 2014: LSTM layers; the source backwards; its last states are the decoder's first
cho        Cho et al. 2014: GRU; the source is one vector, which every step and the readout read
bahdanau   Bahdanau et al. 2014: bidirectional GRU; the additive score of the state before each step; maxout
luong      Luong et al. 2015: LSTM layers, the general score, input feeding; the encoder bidirectional

GRUs are torch.nn's, which reset after the product; Cho's vector joins the input instead of the recurrent product. Where
the decoder's result has the embedding's size, the output has its weights (Press and Wolf 2017).
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import dropout

import fastseq

from ..training.batches import BOS, EOS, PAD
from ..training.files import DataError
from ..training.recipe import Model
from .data import SPECIAL, Sentence, read_ids

PAPERS = ("sutskever", "cho", "bahdanau", "luong")
RANGE = 0.1  # of embeddings at first, either sign: an output of normal ones would begin with a loss of 28
EXTRA = {"paper", "source", "target", "limit"}  # of a saved model


def build(
    paper: str,
    source: list[str],  # words
    target: list[str],
    *,
    embedding: int,
    hidden: int,  # of the decoder; of the encoder's directions together
    layers: int,
    dropout: float,
    limit: int,  # words of a translation
) -> fastseq.Seq2Seq:
    """The model of a paper; dropout is on the embedded target, between layers and on the decoder's result."""
    if layers > 1 and paper in ("cho", "bahdanau"):
        raise fastseq.InputError(f"layers={layers} of {paper}; that paper's has one: use 1, or another model")
    sides = [nn.Embedding(len(words) + SPECIAL, embedding, padding_idx=PAD) for words in (source, target)]
    for side in sides:
        nn.init.uniform_(side.weight, -RANGE, RANGE)
        nn.init.zeros_(side.weight.data[PAD])
    encoder = _encoder(paper, sides[0], hidden, layers, dropout)
    options: dict[str, Any] = {"dropout": dropout if layers > 1 else 0.0, "input_dropout": dropout}
    options |= {"output_dropout": dropout}
    if paper != "sutskever":
        options |= {"memory_size": encoder.output_size, "combine_size": embedding}
    if paper == "cho":
        options |= {"context_side": "input"}
    elif paper == "bahdanau":
        options |= {"cell": "gru"}
    elif paper == "luong":
        options |= {"bridge": fastseq.Bridge("last", map="per_layer")}
    decoder = getattr(fastseq.Decoder, paper)(embedding, hidden, layers, **options)
    tie = "target" if decoder.output_size == embedding else None
    model = fastseq.Seq2Seq(
        encoder, decoder, sides[1].num_embeddings, bos_id=BOS, eos_id=EOS, pad_id=PAD, embedding=sides[1], tie=tie
    )  # fmt: skip
    model.extra = {"paper": paper, "source": source, "target": target, "limit": limit}
    return model


def _encoder(paper: str, embedding: nn.Embedding, hidden: int, layers: int, dropout: float) -> fastseq.Encoder:
    both = paper in ("bahdanau", "luong")
    return fastseq.Encoder(
        embedding.embedding_dim,
        hidden // 2 if both else hidden,
        layers,
        cell="lstm" if paper in ("sutskever", "luong") else "gru",
        bidirectional=both,
        dropout=dropout,
        embedding=embedding,
    )


class DropoutEmbedding(nn.Embedding):
    """An embedding with dropout on what it gives: the source's, while a model learns."""

    def __init__(self, embedding: nn.Embedding, p: float) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        self.load_state_dict(embedding.state_dict())
        self.p = p

    def forward(self, ids: Tensor) -> Tensor:
        return dropout(super().forward(ids), self.p, self.training)


def load(path: Path) -> fastseq.Seq2Seq:
    """The model that `train` left in a file; DataError or fastseq.InputError if it is something else."""
    remedy = "make one: python -m examples.translate train"
    if not path.is_file():
        raise DataError(f"{path}: no model there; {remedy}")
    model = fastseq.Seq2Seq.load(path)
    if model.extra.keys() != EXTRA:
        raise DataError(f"{path}: not a model of this program; {remedy}")
    return model


def read(model: Model, sentences: list[Sentence]) -> tuple[Tensor, Tensor]:
    """(source [N, S], lengths [N]) as the model reads sentences."""
    return read_ids(sentences, model.extra["source"], model.extra["paper"] == "sutskever")


def translate(model: Model, sentences: list[Sentence], beams: int = 1, size: int = 128) -> list[Sentence]:
    """The translation of each sentence of at least one word: greedy, or by beam search."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # of nearly one length in a batch
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *model.extra["target"]]
    result: list[Sentence] = [[] for _ in sentences]
    for start in range(0, len(sentences), size):
        rows = order[start : start + size]
        source, length = read(model, [sentences[i] for i in rows])
        found = model.generate(source, length, num_beams=beams, max_new_tokens=model.extra["limit"])
        for i, ids in zip(rows, found.sequences[:, 0].tolist(), strict=True):
            result[i] = [names[n] for n in ids if n > EOS]
    return result

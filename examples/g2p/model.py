"""An attention encoder and decoder, from letters to phonemes: a fastseq.Seq2Seq.

The encoder is bidirectional. The decoder attends between its layers (as GNMT does, Wu et al. 2016): the first layer
asks (Luong et al. 2015, the general score), the layers above read the state below and the context it found. No context
flows back to the layer that asks, so in training nothing needs a loop over steps but the recurrences themselves.
"""

from pathlib import Path

from torch import nn

import fastseq

from ..training.batches import BOS, EOS, PAD
from ..training.files import DataError
from .data import SPECIAL, spell
from .stock import StockModel

Model = fastseq.Seq2Seq | StockModel


def build(
    letters: list[str], phonemes: list[str], hidden: int, layers: int, limit: int, dropout: float = 0.0
) -> fastseq.Seq2Seq:
    """The model: `hidden` units of a layer and direction and of the embeddings; pronunciations end at `limit`.

    dropout: on what a layer reads of the one below, and on the decoder's result.
    """
    source = nn.Embedding(len(letters) + SPECIAL, hidden, padding_idx=PAD)
    target = nn.Embedding(len(phonemes) + SPECIAL, hidden, padding_idx=PAD)
    encoder = fastseq.Encoder(hidden, hidden, layers, bidirectional=True, embedding=source, dropout=dropout)
    decoder = fastseq.Decoder(
        hidden, hidden, layers, attention="general", memory_size=encoder.output_size,
        attend="after", query_layer=0, context_to="upper", readout=("state", "context"), combine_bias=True,
        bridge=fastseq.Bridge("backward"),  # that direction has just read the word's beginning
        dropout=dropout, output_dropout=dropout,
    )  # fmt: skip
    vocabulary = target.num_embeddings
    model = fastseq.Seq2Seq(encoder, decoder, vocabulary, bos_id=BOS, eos_id=EOS, pad_id=PAD, embedding=target)
    model.extra = {"letters": letters, "phonemes": phonemes, "limit": limit}
    return model


def load(path: Path) -> fastseq.Seq2Seq:
    """The model that `train` left in a file; DataError or fastseq.InputError if it is something else."""
    if not path.is_file():
        raise DataError(f"{path}: no model there; make one: python -m examples.g2p train")
    model = fastseq.Seq2Seq.load(path)
    if model.extra.keys() != {"letters", "phonemes", "limit"}:
        raise DataError(f"{path}: not a model of this program; make one: python -m examples.g2p train")
    return model


def pronounce(model: Model, words: list[str], beams: int = 1, size: int = 1024) -> list[tuple[str, ...]]:
    """The pronunciation of each word: greedy, or by beam search."""
    order = sorted(range(len(words)), key=lambda i: len(words[i]))  # words of one length share a batch
    names = model.extra["phonemes"]
    result: list[tuple[str, ...]] = [()] * len(words)
    for start in range(0, len(words), size):
        rows = order[start : start + size]
        source, length = spell([words[i] for i in rows], model.extra["letters"])
        found = model.generate(source, length, num_beams=beams, max_new_tokens=model.extra["limit"])
        for i, ids in zip(rows, found.sequences[:, 0], strict=True):
            result[i] = tuple(names[n - SPECIAL] for n in ids.tolist() if n >= SPECIAL)  # not EOS and padding
    return result

"""transformers.Trainer trains a fastseq.Seq2Seq to say words; the loop, its logs and its checkpoints are the Trainer's.

python -m examples.trainers.hugging_face [STEPS]     # 300 steps take about half a minute
"""

import tempfile

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import fastseq
from examples.g2p.data import SPECIAL, Lexicon, alphabet, divide, read_cmudict
from examples.trainers import steps_given
from examples.training.batches import BOS, EOS, PAD, pad


def build(letters: int, phonemes: int, hidden: int = 64) -> fastseq.Seq2Seq:
    """Letters to phonemes by Luong's attention."""
    embedding = nn.Embedding(letters, hidden, padding_idx=PAD)
    encoder = fastseq.Encoder(hidden, hidden, bidirectional=True, embedding=embedding)
    decoder = fastseq.Decoder.luong(
        hidden, hidden, memory_size=encoder.output_size, bridge=fastseq.Bridge("last", map="per_layer")
    )
    return fastseq.Seq2Seq(encoder, decoder, phonemes, bos_id=BOS, eos_id=EOS, pad_id=PAD)


class WithLoss(nn.Module):
    """What Trainer calls: a forward that gives a dict with the loss. The model itself stays `.model`."""

    def __init__(self, model: fastseq.Seq2Seq) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, lengths: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model.loss(source, labels, lengths)}


Row = tuple[list[int], list[int]]  # ids of letters; BOS, phonemes, EOS


def rows(lexicon: Lexicon, letters: list[str], phonemes: list[str]) -> list[Row]:
    """Every pronunciation of every word."""
    letter, phoneme = ({x: i for i, x in enumerate(names, SPECIAL)} for names in (letters, phonemes))
    said = ((word, entry) for word, entries in lexicon.items() for entry in entries)
    return [([letter[x] for x in word], [BOS, *(phoneme[p] for p in entry), EOS]) for word, entry in said]


def collate(batch: list[Row]) -> dict[str, Tensor]:
    """Padded to the longest of the batch."""
    source, lengths = pad([row[0] for row in batch])
    return {"source": source, "lengths": lengths, "labels": pad([row[1] for row in batch])[0]}


def train(lexicon: Lexicon, steps: int, folder: str, size: int = 64) -> tuple[fastseq.Seq2Seq, float]:
    """The model, and the loss of held-out words, a mean over their phonemes."""
    rest, held_out = divide(lexicon, 0.02)
    letters, phonemes = alphabet(lexicon)
    model = build(len(letters) + SPECIAL, len(phonemes) + SPECIAL)
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=size, learning_rate=3e-3, use_cpu=True, report_to="none",
        label_names=["labels"], prediction_loss_only=True, logging_steps=50, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(WithLoss(model), arguments, collate, rows(rest, letters, phonemes))
    trainer.train()
    return model, trainer.evaluate(rows(held_out, letters, phonemes))["eval_loss"]


if __name__ == "__main__":
    steps = steps_given(__doc__)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        _, loss = train(read_cmudict(), steps, folder)
    print(f"loss of held-out words: {loss:.2f}")

"""Vector to sequence: what a clock says, from the directions of its hands; the decoder starts from one vector.

python -m examples.recipes.clock      # [cos, sin] of both hands -> "twenty five past three"
"""

import torch
from torch import Tensor, nn

import fastseq

from ..training.batches import BOS, EOS, PAD, pad
from .fit import command, exact_match, fit, samples

ONES = "one two three four five six seven eight nine".split()
HOURS = ["twelve", *ONES, "ten", "eleven"]
TEENS = "ten eleven twelve thirteen fourteen quarter sixteen seventeen eighteen nineteen".split()
MINUTES = [*ONES, *TEENS, "twenty", *(f"twenty {one}" for one in ONES), "half"]  # 1 to 30
WORDS = ["<pad>", "<bos>", "<eos>", "o'clock", "past", "to", *HOURS, *TEENS[3:], "twenty", "half"]


def spoken(hour: int, minute: int) -> str:
    if minute == 0:
        return f"{HOURS[hour]} o'clock"
    return (
        f"{MINUTES[minute - 1]} past {HOURS[hour]}" if minute <= 30 else f"{MINUTES[59 - minute]} to {HOURS[hour - 11]}"
    )


def hands(minutes: Tensor) -> Tensor:
    """[N, 4] of minutes since twelve [N]: both hands, half a degree off or so."""
    angles = torch.stack([minutes / 720, minutes / 60], 1) * 2 * torch.pi + 0.01 * torch.randn(len(minutes), 2)
    return torch.cat([angles.cos(), angles.sin()], 1)


class VectorEncoder(nn.Module):
    """Vectors [B, 4] to a memory that has nothing but the decoder's first state (h, c)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4 * hidden), nn.ReLU(), nn.Linear(4 * hidden, 2 * hidden), nn.Tanh())

    def forward(self, vectors: Tensor, lengths: None = None) -> fastseq.Memory:
        return fastseq.Memory(state=(self.mlp(vectors).chunk(2, 1),))


def train(steps: int = 900, seed: int = 0, hidden: int = 96) -> tuple[fastseq.Seq2Seq, float, float]:
    """A model, the share of times unseen in training that it says right to the word, and that of the commonest."""
    torch.manual_seed(seed)
    said = [f"<bos> {spoken(*divmod(minute, 60))} <eos>".split() for minute in range(720)]
    target, _ = pad([[WORDS.index(word) for word in words] for words in said])
    held_out, rest = torch.randperm(720).split([120, 600])
    decoder = fastseq.Decoder.sutskever(32, hidden)
    model = fastseq.Seq2Seq(VectorEncoder(hidden), decoder, len(WORDS), bos_id=BOS, eos_id=EOS, pad_id=PAD)
    fit(model, lambda rows: model.loss(hands(rows), target[rows]), samples(rest, 128), steps=steps, rate=8e-3)
    found = model.generate(hands(held_out), max_new_tokens=5).sequences[:, 0]
    return model, exact_match(found, target[held_out, 1:]), 1 / len(held_out)


if __name__ == "__main__":
    print("unseen times said right: {:.1%}; by the commonest: {:.1%}".format(*command(train)[1:]))

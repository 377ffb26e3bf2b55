"""A character language model: an LSTM over English, chunk by chunk with its state kept; then it writes some.

python -m examples.recipes.characters      # the texts of Python's own help()
"""

from itertools import cycle
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import fastseq

from .fit import command, fit


class Model(nn.Module):
    """Codes of ASCII [B, T] to logits [B, T, 128] of those that follow, and the state from which the next go on."""

    def __init__(self, hidden: int = 192) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(128, 64), nn.Linear(hidden, 128)
        self.lstm = fastseq.LSTM(64, hidden, batch_first=True)

    def forward(self, text: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, state = self.lstm(self.embedding(text), state)
        return self.output(output), state


def train(steps: int = 300, seed: int = 0, rows: int = 32, chunk: int = 50) -> tuple[Model, float, float]:
    """A model, its accuracy on the next character of a held-out text, and that of the commonest, the space."""
    torch.manual_seed(seed)
    paragraphs = dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))  # topics repeat each other
    text = torch.tensor(list("\n\n".join(paragraphs).encode("ascii", "ignore")))
    held_out, rest = text.split([20_000, len(text) - 20_000])
    streams = rest[: len(rest) // rows * rows].view(rows, -1)
    model, state = Model(), None  # streams are read side by side, over and over; the state is kept all the while

    def loss(part: Tensor) -> Tensor:
        nonlocal state
        logits, (h, c) = model(part[:, :-1], state)
        state = h.detach(), c.detach()
        return nn.functional.cross_entropy(logits.mT, part[:, 1:])

    fit(model, loss, cycle(streams.unfold(1, chunk + 1, chunk).unbind(1)), steps=steps, rate=1e-2)
    with torch.no_grad():
        right = model(held_out[None, :-1], None)[0][0].argmax(-1) == held_out[1:]
    return model, right.float().mean().item(), held_out.bincount().max().item() / len(held_out)


if __name__ == "__main__":
    model, *scores = command(train)
    print("accuracy: {:.1%}; of the commonest character: {:.1%}".format(*scores))
    state, token = None, torch.tensor([[ord("\n")]])
    for _ in range(400):
        with torch.no_grad():
            logits, state = model(token, state)
        token = torch.multinomial((logits[0] / 0.6).softmax(-1), 1)
        print(chr(token), end="", flush=True)

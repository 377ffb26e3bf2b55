"""Captioning: what stands where in an image, by a decoder that attends to a grid of features (Xu et al. 2015).

python -m examples.recipes.captioning      # generated images -> "a red ring left of a blue cross"
"""

import torch
from torch import Tensor, nn

import fastseq

from ..training.batches import BOS, EOS, PAD, pad
from .fit import draws, fit

SHAPES = {"ring": [[1, 1, 1], [1, 0, 1], [1, 1, 1]], "cross": [[0, 1, 0], [1, 1, 1], [0, 1, 0]], "block": 3 * [3 * [1]]}
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.2, 0.3, 0.9), "yellow": (0.9, 0.8, 0.1)}
WORDS = ["<pad>", "<bos>", "<eos>", "a", "above", "left", "of", *COLOURS, *SHAPES]


def draw(words: list[str]) -> Tensor:
    """An image [3, 8, 8] of what a caption says, with noise."""
    ahead, aside = int(torch.randint(3, 6, ())), int(torch.randint(-1, 2, ()))
    down, right = (ahead, aside) if "above" in words else (aside, ahead)
    y, x = (int(torch.randint(max(0, -step), 6 - max(0, step), ())) for step in (down, right))
    image = 0.2 * torch.rand(3, 8, 8)
    for colour, shape, y0, x0 in ((*words[1:3], y, x), (*words[-2:], y + down, x + right)):
        image[:, y0 : y0 + 3, x0 : x0 + 3] += torch.tensor(COLOURS[colour]).view(3, 1, 1) * torch.tensor(SHAPES[shape])
    return image


class Grid(nn.Module):
    """The encoder: images [B, 3, 8, 8] to 64 positions of features, two of which say where they are."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, features - 2, 3, padding=1))
        self.register_buffer("where", torch.cartesian_prod(*2 * [torch.linspace(-1, 1, 8)]).T.view(2, 8, 8))

    def forward(self, images: Tensor, lengths: None = None) -> fastseq.Memory:
        grid = torch.cat([self.look(images).relu(), self.where.expand(len(images), -1, -1, -1)], 1)
        return fastseq.Memory(grid.flatten(2).mT)  # [B, 64, features]


def train(steps: int = 450, features: int = 64, copies: int = 10) -> tuple[fastseq.Seq2Seq, float, float]:
    """A model, the share of images of unseen pairs that it captions right to the word, and that of the commonest."""
    torch.manual_seed(0)
    things = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    captions = [f"{one} {how} {two}".split() for one in things for how in ("above", "left of") for two in things]
    images = torch.stack([draw(words) for words in copies * captions])
    target, _ = pad(copies * [[WORDS.index(word) for word in ("<bos>", *words, "<eos>")] for words in captions])
    rows = torch.arange(len(images)).view(copies, -1)[:, torch.randperm(len(captions))]
    held_out, rest = rows[:, :48].flatten(), rows[:, 48:].flatten()
    decoder = fastseq.Decoder.bahdanau(32, 96, memory_size=features, bridge=fastseq.Bridge("mean", act="tanh"))
    model = fastseq.Seq2Seq(Grid(features), decoder, len(WORDS), bos_id=BOS, eos_id=EOS, pad_id=PAD)
    fit(model, lambda rows: model.loss(images[rows], target[rows]), draws(rest, 32), steps=steps, rate=8e-3)
    found = model.generate(images[held_out], max_new_tokens=9).sequences[:, 0]
    return model, (found == target[held_out, 1 : 1 + found.shape[1]]).all(1).float().mean().item(), 1 / 48


if __name__ == "__main__":
    print("images captioned right: {:.1%}; with the commonest caption: {:.1%}".format(*train()[1:]))

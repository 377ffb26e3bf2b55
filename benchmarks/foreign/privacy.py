"""Opacus: words classified under differential privacy, by an embedding and an LSTM, as in its own example of names.

Its hooks want one gradient for each sample. Layers that it has no rule for go through torch.func (`FUNCTIONAL`); with
`register_grad_sampler` a user gives the rule (`SAMPLER`): here backward of one sample after another.
"""

import random

import torch
from opacus import PrivacyEngine
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .program import Convert, Learned, Program

WORDS, BATCH, LENGTH = 512, 64, 15
ENDINGS = ("ski", "son", "ez", "ov", "ini")


class Outputs(nn.LSTM):
    """An LSTM that gives its outputs alone: Opacus multiplies them by their gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[0]


class Sampled(Outputs):
    """The same, with a rule of its own."""


@register_grad_sampler(Sampled)
def samples(layer: Sampled, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Of each parameter its gradients [B, ...]."""
    parameters = list(layer.parameters())
    gradients = []
    for x, grad in zip(activations[0].split(1), backprops.split(1), strict=True):
        with torch.enable_grad():
            out, _ = nn.LSTM.forward(layer, x)
        gradients.append(torch.autograd.grad(out, parameters, grad))
    return {p: torch.stack(g) for p, g in zip(parameters, zip(*gradients, strict=True), strict=True)}


class Classifier(nn.Module):
    """Letters [B, T] to logits [B, classes], by the last output."""

    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(27, 64)
        self.lstm = lstm
        self.out = nn.Linear(128, len(ENDINGS))

    def forward(self, letters: Tensor) -> Tensor:
        return self.out(self.lstm(self.embedding(letters))[:, -1])


def build(kind: type[Outputs]) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader]:
    """Made private by the engine."""
    draw = random.Random(0)
    classes = [draw.randrange(len(ENDINGS)) for _ in range(WORDS)]
    names = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=8)) + ENDINGS[c] for c in classes]
    ids = torch.tensor([[ord(letter) - 96 for letter in name.rjust(LENGTH, "`")] for name in names])
    batches = DataLoader(TensorDataset(ids, torch.tensor(classes)), batch_size=BATCH)
    model = Classifier(kind(64, 128, batch_first=True))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    return PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=batches, noise_multiplier=0.5, max_grad_norm=1.0
    )


def run(built: tuple[nn.Module, torch.optim.Optimizer, DataLoader]) -> Learned:
    model, optimizer, batches = built
    losses = []
    for letters, classes in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(letters), classes)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Learned(losses, [p.detach() for p in model.parameters()])


def _functional(convert: Convert) -> object:
    return build(Outputs)


def _sampler(convert: Convert) -> object:
    return build(Sampled)


_SIZES = f"I=64, H=128, T={LENGTH}, B={BATCH} on average; {WORDS // BATCH} updates"
FUNCTIONAL = Program("opacus", f"torch.func (no rule for the layer): {_SIZES}", "patch", _functional, run)
SAMPLER = Program("opacus", f"a rule, sample by sample: {_SIZES}", "patch", _sampler, run)

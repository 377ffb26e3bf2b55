"""Forecasting: a network's load in the next 24 hours, with its range, from the past week and the weather to come.

python -m examples.recipes.forecasting      # generated: habits of day and week, temperature, noise that lasts
"""

import torch
from torch import Tensor, nn

import fastseq

from .fit import draws, fit

PAST, AHEAD, QUANTILES = 168, 24, torch.tensor([0.1, 0.5, 0.9])  # hours, hours


def network(hours: int) -> tuple[Tensor, Tensor]:
    """Load [hours], and what is known of any hour [hours, 4]: time of day, weekend, temperature."""
    hour, noise = torch.arange(hours), torch.randn(2, hours)
    for t in range(1, hours):
        noise[:, t] = torch.tensor([0.98, 0.8]) * noise[:, t - 1] + torch.tensor([0.2, 0.6]) * noise[:, t]
    day, weekend = 2 * torch.pi * hour / 24, (hour // 24 % 7 >= 5).float()
    temperature = noise[0] + 0.7 * (day - 2.4).sin()
    load = (1 - 0.6 * weekend) * ((day - 1.8).sin() + 0.5 * (2 * day).sin())  # of habit
    load += 0.4 * temperature.square() + 0.15 * noise[1]
    return load, torch.stack([day.sin(), day.cos(), weekend, temperature], 1)


class Forecaster(nn.Module):
    """Hours past [B, PAST, 5], load and what is known, and those ahead [B, AHEAD, 4] to quantiles [B, AHEAD, 3]."""

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.encoder = fastseq.Encoder(5, hidden)
        self.decoder = fastseq.Decoder.luong(4, hidden, memory_size=hidden)
        self.output = nn.Linear(hidden, len(QUANTILES))

    def forward(self, past: Tensor, ahead: Tensor) -> Tensor:
        return self.output(self.decoder(ahead, self.encoder(past))[0])


def pinball(quantiles: Tensor, real: Tensor) -> Tensor:
    """The mean loss of quantiles [..., 3] (Koenker and Bassett 1978); least in the mean where they are right."""
    error = real[..., None] - quantiles
    return torch.maximum(QUANTILES * error, (QUANTILES - 1) * error).mean()


def train(steps: int = 200) -> tuple[Forecaster, float, float]:
    """A model, by how much its loss in weeks unseen in training is below that of yesterday's load, and 0: of that."""
    torch.manual_seed(0)
    load, known = (t.unfold(0, PAST + AHEAD, 1) for t in network(24 * 7 * 40))
    past, ahead = torch.cat([load[..., None], known.mT], 2).split([PAST, AHEAD], 1)
    model, split = Forecaster(), len(load) * 3 // 4
    batches = draws(torch.arange(split - PAST - AHEAD), 64)  # of windows that end before those of the test begin
    fit(model, lambda i: pinball(model(past[i], ahead[i, :, 1:]), ahead[i, :, 0]), batches, steps=steps, rate=1e-2)
    found = pinball(model(past[split:], ahead[split:, :, 1:]).detach(), ahead[split:, :, 0])
    return model, 1 - (found / pinball(past[split:, -AHEAD:, :1], ahead[split:, :, 0])).item(), 0.0


if __name__ == "__main__":
    print("loss below that of yesterday's values: {:.1%}; of those: {:.1%}".format(*train()[1:]))

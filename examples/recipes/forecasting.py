"""Forecasting: a network's load in the next 24 hours, as quantiles, from the past week and the weather forecast.

python -m examples.recipes.forecasting      # generated: habits of day and week, temperature, deviations that last
"""

import torch
from torch import Tensor, nn

import fastseq

from .fit import command, fit, samples

PAST, AHEAD, QUANTILES = 168, 24, torch.tensor([0.1, 0.5, 0.9])  # hours, hours


def load_series(hours: int) -> tuple[Tensor, Tensor]:
    """Load [hours], and what is known of any hour [hours, 4]: time of day, weekend, temperature as forecast."""
    hour, noise = torch.arange(hours), torch.randn(2, hours)
    for t in range(1, hours):
        noise[:, t] = 0.97 * noise[:, t - 1] + 0.24 * noise[:, t]
    day, weekend = 2 * torch.pi * hour / 24, (hour // 24 % 7 >= 5).float()
    temp, habit = noise[0] + 0.7 * (day - 2.4).sin(), (1 - 0.6 * weekend) * ((day - 1.8).sin() + 0.5 * (2 * day).sin())
    known = torch.stack([day.sin(), day.cos(), weekend, temp + 0.2 * torch.randn(hours)], 1)
    return habit + 0.4 * temp.square() + 0.4 * noise[1], known


class Forecaster(nn.Module):
    """Hours past [B, PAST, 5], load and what is known, and those ahead [B, AHEAD, 4] to quantiles [B, AHEAD, 3]."""

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.encoder, self.output = fastseq.Encoder(5, hidden), nn.Linear(hidden, len(QUANTILES))
        self.decoder = fastseq.Decoder.luong(4, hidden, memory_size=hidden)

    def forward(self, past: Tensor, ahead: Tensor) -> Tensor:
        return self.output(self.decoder(ahead, self.encoder(past))[0])


def pinball(quantiles: Tensor, real: Tensor) -> Tensor:
    """The mean loss of quantiles [..., 3] (Koenker and Bassett 1978); least in the mean where they are right."""
    error = real[..., None] - quantiles
    return torch.maximum(QUANTILES * error, (QUANTILES - 1) * error).mean()


def train(steps: int = 200, seed: int = 0) -> tuple[Forecaster, float, float]:
    """A model, its skill in unseen weeks, 1 - loss / that of yesterday's load with quantiles of its error; and 0."""
    torch.manual_seed(seed)
    load, known = (t.unfold(0, PAST + AHEAD, 1) for t in load_series(24 * 7 * 40))
    past, known = torch.cat([load[..., None], known.mT], 2)[:, :PAST], known.mT[:, PAST:]
    ahead, yesterday, model, test = load[:, PAST:], load[:, PAST - AHEAD : PAST], Forecaster(), slice(5000, None)
    rest = torch.arange(5000 - PAST - AHEAD)  # windows that end before the first of the test begins
    fit(model, lambda i: pinball(model(past[i], known[i]), ahead[i]), samples(rest, 64), steps=steps, rate=1e-2)
    naive = yesterday[test, :, None] + torch.quantile((ahead - yesterday)[rest], QUANTILES)
    with torch.no_grad():
        loss = pinball(model(past[test], known[test]), ahead[test])
    return model, 1 - (loss / pinball(naive, ahead[test])).item(), 0.0


if __name__ == "__main__":
    print("loss below that of yesterday's load: {:.1%}; of that itself: {:.1%}".format(*command(train)[1:]))

"""Quantiles, means and an interval for a median."""

import math
from collections.abc import Sequence

import torch

__all__ = ["bootstrap", "geometric_mean", "median", "quantile"]


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between the nearest two."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def bootstrap(values: Sequence[float], resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the median (Efron 1979, percentile method)."""
    v = torch.tensor(values, dtype=torch.float64)
    draws = torch.randint(len(v), (resamples, len(v)), generator=torch.Generator().manual_seed(seed))
    medians = v[draws].quantile(0.5, dim=1).tolist()
    return quantile(medians, 0.025), quantile(medians, 0.975)

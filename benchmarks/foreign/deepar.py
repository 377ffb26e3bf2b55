"""GluonTS's DeepAR: an estimator that makes, trains and keeps its model by itself, then forecasts by sampling."""

from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from gluonts.dataset.common import ListDataset
from gluonts.torch.model.deepar import DeepAREstimator

from .forecasting import Losses
from .program import Convert, Learned, Program

SERIES, LENGTH, PAST, AHEAD = 40, 400, 72, 24
UPDATES, BATCH, SAMPLES = 20, 32, 100


def build(convert: Convert) -> tuple[DeepAREstimator, ListDataset, Losses, TemporaryDirectory]:
    """The estimator and hourly series, sines of a day with noise."""
    rng = np.random.default_rng(0)
    hours = np.arange(LENGTH)
    day = [10 + np.sin(hours * np.pi / 12 + rng.uniform(0, 6)) + rng.normal(0, 0.1, LENGTH) for _ in range(SERIES)]
    data = ListDataset([{"target": y, "start": pd.Period("2024-01-01", "h")} for y in day], freq="h")
    losses, folder = Losses(), TemporaryDirectory()
    estimator = DeepAREstimator(
        freq="h",
        prediction_length=AHEAD,
        context_length=PAST,
        num_layers=2,
        hidden_size=40,
        batch_size=BATCH,
        num_batches_per_epoch=UPDATES,
        num_parallel_samples=SAMPLES,
        trainer_kwargs={
            "max_epochs": 1,
            "accelerator": "cpu",
            "callbacks": [losses],
            "logger": False,
            "default_root_dir": folder.name,  # it keeps the best model there
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    )
    return estimator, data, losses, folder


def run(built: tuple[DeepAREstimator, ListDataset, Losses, TemporaryDirectory]) -> Learned:
    estimator, data, losses, _ = built
    predictor = estimator.train(data)
    forecasts = [torch.from_numpy(forecast.samples) for forecast in predictor.predict(data)]
    return Learned(losses.values, [torch.stack(forecasts)])


PROGRAM = Program(
    "gluonts",
    f"DeepAR: H=40, 2 layers, B={BATCH}, T={PAST + AHEAD}; {UPDATES} updates, then {SAMPLES} sampled paths of {AHEAD} "
    f"steps for {SERIES} series",
    "patch",
    build,
    run,
)

"""pytorch-forecasting's RecurrentNetwork: a `class LSTM(RNN, nn.LSTM)`, or GRU, over one feature."""

import lightning.pytorch as lightning
import numpy as np
import pandas as pd
from pytorch_forecasting import RecurrentNetwork, TimeSeriesDataSet

from .program import Convert, Learned, Program

SERIES, LENGTH, PAST, AHEAD = 64, 100, 48, 12
STEPS, BATCH = 25, 128


class Losses(lightning.Callback):
    """Those of all updates."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: object, module: object, outputs: dict, *_: object) -> None:
        self.values.append(float(outputs["loss"]))


def build(cell: str) -> tuple[RecurrentNetwork, object]:
    """The model and its batches; each series a noisy sine."""
    time = np.arange(LENGTH)
    rng = np.random.default_rng(0)
    waves = [np.sin(time / rng.uniform(2, 9)) + rng.normal(0, 0.1, LENGTH) for _ in range(SERIES)]
    frame = pd.DataFrame(
        {
            "series": np.repeat([str(i) for i in range(SERIES)], LENGTH),
            "time": np.tile(time, SERIES),
            "value": np.concatenate(waves).astype("float32"),
        }
    )
    data = TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=PAST,
        max_prediction_length=AHEAD,
        time_varying_unknown_reals=["value"],
    )
    model = RecurrentNetwork.from_dataset(data, cell_type=cell, hidden_size=64, rnn_layers=2, dropout=0.1)
    return model, data.to_dataloader(train=True, batch_size=BATCH, num_workers=0)


def run(built: tuple[RecurrentNetwork, object]) -> Learned:
    model, batches = built
    losses = Losses()
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        gradient_clip_val=0.1,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches)
    return Learned(losses.values, [p.detach() for p in model.parameters()])


def _lstm(convert: Convert) -> object:
    return build("LSTM")


def _gru(convert: Convert) -> object:
    return build("GRU")


_SIZES = f"I=1, H=64, 2 layers, B={BATCH}, T={PAST} and {AHEAD}; {STEPS} updates by Lightning"
LSTM = Program("pytorch-forecasting", f"RecurrentNetwork, LSTM: {_SIZES}", "patch", _lstm, run)
GRU = Program("pytorch-forecasting", f"RecurrentNetwork, GRU: {_SIZES}", "patch", _gru, run)

"""A trained model in one file: its Config and parameters, readable by torch.load with weights_only."""

import os
import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from .data import DataError
from .model import Config, Model

FORMAT = "fastseq-g2p-2"


def save(model: Model, path: Path) -> None:
    """Write the file whole or not at all: what stood there stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        torch.save({"format": FORMAT, "config": asdict(model.config), "parameters": model.state_dict()}, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> Model:
    """The model in a file that `save` wrote; DataError if it is something else."""
    if not path.is_file():
        raise DataError(f"{path}: no checkpoint there; make one: python -m examples.g2p train")
    if not zipfile.is_zipfile(path):  # torch.load would take it for its old format, and fail in any way
        raise DataError(f"{path}: no checkpoint, or half of one")
    try:
        content = torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise DataError(f"{path}: no checkpoint that torch can read ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: not a checkpoint of this program ({FORMAT})")
    model = Model(Config(**content["config"]))
    model.load_state_dict(content["parameters"])
    return model.eval()

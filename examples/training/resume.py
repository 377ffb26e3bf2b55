"""A run's state in one safetensors file, replaced whole or not at all: from it a run that was killed goes on.

The header's metadata: "format", "numbers" (JSON) and "digest", the SHA-256 of the numbers and of the tensors' file.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor

from .files import DataError

FORMAT = "fastseq-training-1"

Tensors = dict[str, Tensor]
Numbers = dict[str, Any]


def save(path: Path, tensors: Tensors, numbers: Numbers) -> None:
    """Write the file; what stood there stays until the new one is on the disk."""
    text = json.dumps(numbers)
    metadata = {"format": FORMAT, "numbers": text, "digest": digest(tensors, text)}
    with partial(path).open("wb") as file:
        file.write(safetensors.save(tensors, metadata))
        file.flush()
        os.fsync(file.fileno())
    partial(path).replace(path)


def load(path: Path) -> tuple[Tensors, Numbers]:
    """What `save` wrote; DataError if it is not that any more."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise DataError(f"{path}: cut or edited ({error}); add --fresh to start anew") from None
    if metadata.get("format") != FORMAT:
        raise DataError(f"{path}: no state of a run ({FORMAT}); add --fresh to start anew")
    if metadata.get("digest") != digest(tensors, metadata.get("numbers", "")):
        raise DataError(f"{path}: edited, it is not what its digest says; add --fresh to start anew")
    return tensors, json.loads(metadata["numbers"])


def remove(path: Path) -> None:
    """The file, and what a kill while it was written left."""
    path.unlink(missing_ok=True)
    partial(path).unlink(missing_ok=True)


def need_same(path: Path, then: Numbers, now: Numbers) -> None:
    """DataError, naming every difference, unless a stored run is the one that is asked for."""
    if other := [f"{name}={then.get(name)}, now {value}" for name, value in now.items() if then.get(name) != value]:
        raise DataError(
            f"{path}: a run that has not ended, with {'; '.join(other)}: ask for the same to go on, or add --fresh to"
            " start anew"
        )


def digest(tensors: Tensors, text: str) -> str:
    return hashlib.sha256(text.encode() + safetensors.save(tensors)).hexdigest()


def partial(path: Path) -> Path:
    return path.with_suffix(".partial")

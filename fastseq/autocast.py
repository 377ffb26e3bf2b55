"""Output dtypes under torch.autocast: on the CPU those of torch.nn, as data, which a test takes anew and compares."""

from itertools import product

import torch

__all__ = ["LOWERED", "output_dtype"]

# On the CPU (cell, "padded" | "packed" | "cell", autocast dtype): torch.nn answers in the autocast dtype. Everything
# else, and the LSTM with a projection, answers in the dtype of the state: hx where given, the input otherwise.
LOWERED = frozenset({
    ("lstm", "padded", torch.bfloat16),
    *product(("rnn_tanh", "rnn_relu"), ("padded", "packed", "cell"), (torch.bfloat16, torch.float16)),
})  # fmt: skip


def output_dtype(
    device: str, cell: str, kind: str, autocast: torch.dtype, state: torch.dtype, proj_size: int = 0
) -> torch.dtype:
    """What torch.nn answers on a kind of device for a state (hx, or else the input) of dtype `state`.

    CUDA's autocast lowers every recurrent operator: "CUDA Ops that can autocast to float16", docs.pytorch.org/docs/amp.
    """
    if device == "cuda":
        return autocast
    return autocast if (cell, kind, autocast) in LOWERED and not proj_size else state

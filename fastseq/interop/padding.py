"""Batches of toolkits that pad on the left."""

import torch
from torch import Tensor

from ..checks import need_tensor
from ..errors import InputError

__all__ = ["right_padded"]


def right_padded(
    src: Tensor,  # [B, S] ids, padded on the left, as fairseq's encoder takes them
    pad_id: int,
) -> tuple[Tensor, Tensor]:
    """(src [B, S] padded on the right, lengths [B] int64): what `Seq2Seq` takes.

    Raises InputError for padding within a row, TypeError for what is no tensor.
    """
    if need_tensor("src", src).dim() != 2:
        raise InputError(f"src has shape {tuple(src.shape)}; expected token ids [B, S]")
    padding = src == pad_id
    begins = padding.sum(1)
    places = torch.arange(src.shape[1], device=src.device)
    if bool((padding != (places < begins[:, None])).any()):
        raise InputError(f"src has pad_id={pad_id} behind a token; expected it on the left of each row alone")
    turned = src.gather(1, (places + begins[:, None]) % max(1, src.shape[1]))
    return turned, src.shape[1] - begins

"""The Seq2Seq of an encoder, a decoder and the weights that a toolkit's keys gave."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..modules import Decoder, Encoder, Seq2Seq
from .weights import Stack, Weights, equal

__all__ = ["assembled", "need_layers", "shared_map"]


def shared_map(weights: Weights, form: str, outputs: int, inputs: int) -> dict[str, Tensor]:
    """weight and bias of the Linear that keys `form` hold, by these names."""
    return {
        "weight": weights.take(form.format("weight"), outputs, inputs),
        "bias": weights.take(form.format("bias"), outputs),
    }


def need_layers(toolkit: str, encoder: Stack, decoder: Stack) -> None:
    """InputError unless each layer of the decoder starts from the encoder's of the same number."""
    if encoder.num_layers != decoder.num_layers or encoder.cell != decoder.cell:
        raise InputError(
            f"{toolkit}'s encoder has {encoder.num_layers} layer(s) of {encoder.cell!r}, its decoder"
            f" {decoder.num_layers} of {decoder.cell!r}; models where both are the same are supported"
        )


def assembled(
    stack: Stack,  # the encoder's layers
    make_decoder: Callable[[], Decoder],
    decoder: Mapping[str, Tensor],  # its parameters, by their names in `Decoder`
    source: Tensor,  # [Vs, Es]
    target: Tensor,  # [V, I]
    output: tuple[Tensor, Tensor | None],  # [V, R], [V] or None
    ids: dict[str, Any],  # bos_id, eos_id, pad_id
) -> Seq2Seq:
    """The model in eval mode, in the weights' dtype and on their device. What has equal values is tied."""
    weight, bias = output
    shared, tied = equal(source, target), equal(target, weight)
    tie = ("all" if shared else "target") if tied else None
    if target.shape[0] != weight.shape[0]:
        raise InputError(f"the target's embedding has {target.shape[0]} rows, the output {weight.shape[0]}; expected V")
    with torch.device("meta"):  # no memory, and torch's random state stays as it is
        embedding = nn.Embedding(source.shape[0], source.shape[1], padding_idx=ids["pad_id"])
        encoder = Encoder(
            source.shape[1], stack.hidden_size, stack.num_layers, cell=stack.cell, bidirectional=stack.dirs == 2,
            embedding=embedding,
        )  # fmt: skip
        own = embedding if shared and not tied else None
        model = Seq2Seq(
            encoder, make_decoder(), len(weight), embedding=own, output_bias=bias is not None, tie=tie, **ids
        )  # fmt: skip
    found = {f"encoder.{name}": t for name, t in stack.tensors.items()}
    found |= {f"decoder.{name}": t for name, t in decoder.items()}
    found |= {"encoder.embedding.weight": source, "embedding.weight": target, "output.weight": weight}
    found |= {} if bias is None else {"output.bias": bias}
    model.load_state_dict(
        {name: t.clone(memory_format=torch.contiguous_format) for name, t in found.items()}, assign=True
    )
    if tie is not None:  # assigned one by one, they are so many parameters
        model.output.weight = model.embedding.weight
    return model.eval()

"""What the tests of every toolkit's importer share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq import InputError, Seq2Seq

__all__ = ["LENGTHS", "SRC", "TGT", "check_keys_and_shapes", "check_saving", "sgd_step"]

PAD, BOS, EOS = 1, 2, 3
LENGTHS = torch.tensor([6, 4, 4, 1])  # sorted, as toolkits want them
SRC = torch.randint(4, 12, (4, 6), generator=torch.Generator().manual_seed(0))
SRC = SRC.masked_fill(torch.arange(6) >= LENGTHS[:, None], PAD)
TGT = torch.randint(4, 13, (4, 8), generator=torch.Generator().manual_seed(1))
TGT[:, 0] = BOS
TGT[torch.arange(4), torch.tensor([7, 5, 6, 2])] = EOS
TGT = TGT.masked_fill(torch.arange(8) > torch.tensor([7, 5, 6, 2])[:, None], PAD)


def sgd_step(model: nn.Module, loss: Tensor) -> None:
    """Gradient descent; parameters without a gradient are a fault of the caller's."""
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)


def check_saving(model: Seq2Seq, path: Path) -> None:
    """A file gives the same model again."""
    fastseq.save(model, path)
    again = Seq2Seq.load(path)
    assert again.tie == model.tie
    first = model.encoder.embedding.weight.device  # type: ignore[union-attr]
    assert first.type == "cpu"
    torch.testing.assert_close(again(SRC, TGT, LENGTHS).logits, model(SRC, TGT, LENGTHS).logits, rtol=0, atol=0)


def check_keys_and_shapes(convert: Callable[..., Seq2Seq], state: dict[str, Tensor], entry: str) -> None:
    """Every key is needed, of its shape; none more is taken; and the model's parameters are its own."""
    for name, value in state.items():
        missing = {key: t for key, t in state.items() if key != name}
        with pytest.raises(InputError, match=r"has no '|mean nothing here|and no key shows which|shape"):
            convert(missing)
        grown = torch.zeros([n + 1 for n in value.shape], dtype=value.dtype)
        with pytest.raises(InputError, match=r"shape|rows|reads"):
            convert(state | {name: grown})
        with pytest.raises(InputError, match="not quantized"):
            convert(state | {name: value.to(torch.int8)})
        with pytest.raises(InputError, match="convert them to one dtype"):
            convert(state | {name: value.half()})
    with pytest.raises(InputError, match=r"1 key\(s\) .* mean nothing here: 'decoder.extra.weight'"):
        convert(state | {"decoder.extra.weight": torch.zeros(2)})
    with pytest.raises(InputError, match=f"whole checkpoint.*{entry}"):
        convert({entry: state})
    with pytest.raises(TypeError, match="must be a mapping, got str"):
        convert("model.pt")
    with pytest.raises(TypeError, match="is an int, not a tensor"):
        convert(state | {"steps": 3})
    model = convert(state)
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.requires_grad
            parameter.zero_()
    assert all(value.any() for name, value in state.items() if name.endswith("weight"))

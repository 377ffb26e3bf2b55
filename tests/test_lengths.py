"""Lengths on a GPU stay there, unread. The meta device stands in for one: it has no values to read."""

from typing import Any

import pytest
import torch
from torch import nn

import fastseq
from fastseq import InputError, checks
from fastseq.backends import reference, stock
from fastseq.backends.call import RnnCall
from fastseq.checks import checked_lengths

X = torch.empty(4, 3, 5, device="meta")  # [T, B, I]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_lengths_of_a_gpu_are_handed_on(dtype: torch.dtype) -> None:
    """The very tensor; other integers are converted there."""
    lengths = torch.empty(3, dtype=dtype, device="meta")
    assert checked_lengths(lengths, X, 3, 4) is lengths
    assert checked_lengths(lengths.to(torch.int16), X, 3, 4).dtype == torch.int64


def test_their_shape_and_dtype_are_checked() -> None:
    """Nobody waits for that."""
    with pytest.raises(InputError, match=r"lengths has shape \(2,\), expected \(3,\)"):
        checked_lengths(torch.empty(2, dtype=torch.int64, device="meta"), X, 3, 4)
    with pytest.raises(TypeError, match="lengths must hold integers"):
        checked_lengths(torch.empty(3, device="meta"), X, 3, 4)


@pytest.mark.parametrize("lengths", [[1, 0, 4], torch.tensor([1, 0, 4])])
def test_others_are_checked_on_the_cpu(lengths: Any) -> None:
    """A list, or a tensor of the CPU, whose values cost nothing."""
    assert checked_lengths(lengths, X, 3, 4).device.type == "cpu"
    lengths[0] = 5
    with pytest.raises(InputError, match=r"lengths\[0\]=5 is outside \[0, T=4\]"):
        checked_lengths(lengths, X, 3, 4)


@pytest.mark.parametrize("backend", [name for name, reason in fastseq.backends().items() if reason is None])
def test_any_strides(backend: str) -> None:
    """A column of a table, and one number for every row."""
    layer, x = fastseq.LSTM(5, 6, bidirectional=True, backend=backend), torch.randn(4, 3, 5)
    column, same = torch.tensor([[1, 9], [3, 9], [2, 9]])[:, 0], torch.tensor([2]).expand(3)
    for lengths in (column, same):
        found, expected = layer(x, lengths=lengths), layer(x, lengths=lengths.tolist())
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_fastseq_check_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """For whoever looks for a fault in their data; here the reading itself fails."""
    monkeypatch.setenv("FASTSEQ_CHECK", "1")
    with pytest.raises(NotImplementedError, match="meta"):
        checked_lengths(torch.empty(3, dtype=torch.int64, device="meta"), X, 3, 4)


def test_parts_hand_them_on() -> None:
    """A layer, an encoder and `reverse` run to their end without a look at the values."""
    lengths = torch.empty(3, dtype=torch.int64, device="meta")
    layer = fastseq.LSTM(5, 6, backend="reference", device="meta")
    assert layer(X, lengths=lengths)[0].shape == (4, 3, 6)
    memory = fastseq.Encoder(5, 6, backend="reference", device="meta")(X.transpose(0, 1), lengths)
    assert memory.out is not None
    assert memory.out.shape == (3, 4, 6)
    assert fastseq.functional.reverse(X.transpose(0, 1), lengths).shape == (3, 4, 5)


@pytest.mark.parametrize("backend", [reference, stock])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_unchecked_lengths_are_clamped(backend: Any, cell: str) -> None:
    """Below 0 is 0, above T is T."""
    kinds = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}
    module = kinds[cell](5, 6)
    x = torch.randn(4, 3, 5)

    def answer(lengths: list[int]) -> Any:
        return backend.rnn(RnnCall(cell, x, None, None, list(module.parameters()), torch.tensor(lengths)))

    got, expected = answer([-3, 9, 2]), answer([0, 4, 2])
    assert torch.equal(got[0], expected[0])
    for one, other in zip(got[1], expected[1], strict=True):
        assert torch.equal(one, other)


def test_the_name_is_told() -> None:
    """Of sequences to sequences there are two kinds."""
    with pytest.raises(InputError, match="src_lengths has shape"):
        checks.checked_lengths(torch.empty(2, dtype=torch.int64, device="meta"), X, 3, 4, "src_lengths")

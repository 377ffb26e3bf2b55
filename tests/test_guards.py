"""The guard bands around tensors of the tests: a planted overrun is found, and named."""

import ctypes
from collections.abc import Callable

import pytest
import torch

from tests.guards import ALIGNED, OutOfBounds, guard_bands
from tests.oracle import nan_in_empty

MAKERS = {
    "empty": lambda: torch.empty(3, 5),
    "new_empty": lambda: torch.ones(2).new_empty((3, 5)),
    "empty_like": lambda: torch.empty_like(torch.ones(3, 5)),
    "zeros": lambda: torch.zeros(3, 5),
}


def write(t: torch.Tensor, element: int, value: float = 0.0) -> None:
    ctypes.c_float.from_address(t.data_ptr() + element * t.element_size()).value = value


@pytest.mark.parametrize("place", [-1, -900, 15, 900])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_write_beyond_a_tensor_is_found(make: Callable[[], torch.Tensor], place: int) -> None:
    """One element before or behind it, or a row of units away; also of a tensor that is gone by then."""
    side = "before" if place < 0 else "behind"
    with pytest.raises(OutOfBounds, match=rf"4 bytes {side} a torch\.float32 tensor of shape \(3, 5\)"), guard_bands():
        write(make(), place)


def test_every_element_of_a_tensor_may_be_written() -> None:
    with guard_bands():
        made = [torch.empty(n, dtype=dtype) for n in range(1, 70) for dtype in (torch.float32, torch.uint8)]
        for t in made:
            t.fill_(1)
    assert all(t.data_ptr() % ALIGNED == 0 == t.storage_offset() for t in made)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_read_beyond_is_nan(dtype: torch.dtype) -> None:
    with guard_bands():
        t = torch.empty(5, dtype=dtype)
        around = (ctypes.c_char * (t.element_size() * 15)).from_address(t.data_ptr() - t.element_size() * 5)
        beyond = torch.frombuffer(bytearray(around), dtype=dtype)
        assert beyond[:5].isnan().all()
        assert beyond[10:].isnan().all()


def test_unwritten_memory_of_the_oracle_is_guarded_nan() -> None:
    with nan_in_empty():
        assert torch.empty(2, 3).isnan().all()
    with pytest.raises(OutOfBounds, match="behind"), nan_in_empty():
        write(torch.empty(2, 3), 6)


def test_nested_bands_are_looked_at_by_the_outermost() -> None:
    before = torch.empty, torch.Tensor.new_empty
    with pytest.raises(OutOfBounds), guard_bands(), guard_bands():
        write(torch.empty(3), 3)
    assert before == (torch.empty, torch.Tensor.new_empty)

"""What the kernels share, interpreted."""

import signal
from typing import Any, NoReturn

import pytest
import torch

triton = pytest.importorskip("triton")
from fastseq.kernels.blocks import wait_for_all  # noqa: E402


@triton.jit
def meet(counter, arrived):
    wait_for_all(counter, arrived)


def waits_for_ever(*_: Any) -> NoReturn:
    raise TimeoutError("the barrier was not left within 20 s")


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of numpy, which GPUs do not give
def test_a_barrier_counts_past_32_bits() -> None:
    """132 programs come to 2**31 after 16 million barriers. The last arrival wraps; to wait on would be for ever."""
    counter = torch.tensor([2**31 - 1], dtype=torch.int32)
    signal.signal(signal.SIGALRM, waits_for_ever)
    signal.alarm(20)
    try:
        meet[(1,)](counter, 2**31 - 1)
    finally:
        signal.alarm(0)
    assert counter.item() == -(2**31)

"""What every test starts from: one seed and one thread; the thread count and ISA variant are put back."""

import os
from collections.abc import Generator, Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from fastseq import _gpus, _native, _triton
from fastseq.ops import decoder_native

collect_ignore = []
if not _triton.interprets():  # fixed when a kernel is decorated: those tests have a process of their own
    collect_ignore.append("interpreted")
elif find_spec("triton") is not None:
    from tests.interpreter import patch_once

    patch_once()
if "FASTSEQ_STUB_DRIVER" not in os.environ:  # tests/test_triton_launched.py gives them a process of their own
    collect_ignore.append("stubbed")
NO_GPU = None if os.environ.get("FASTSEQ_REHEARSE") == "1" else _gpus.no_gpu()
if NO_GPU is not None:
    collect_ignore.append("gpu")


def pytest_report_header() -> str:
    return "tests/gpu: " + ("collected" if NO_GPU is None else f"left out, for want of a GPU: {NO_GPU}")


# Without AVX-512 PyTorch's own LSTM in bf16 raises under autocast, and after one in fp32 has run.
HAS_HALF_LSTM = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
NO_HALF_LSTM = "PyTorch's own LSTM in bf16, which this compares with, needs a CPU with AVX-512"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """A test that meets that error of PyTorch's, on such a CPU, is skipped."""
    try:
        return (yield)
    except RuntimeError as error:
        if HAS_HALF_LSTM or "could not create a primitive descriptor for the LSTM" not in str(error):
            raise
        pytest.skip(NO_HALF_LSTM)


needs_native = pytest.mark.skipif(_native.C is None, reason=str(_native.reason))


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Tests neither depend on their order nor leave settings behind."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would only wait for each other on tensors this small
    isa = None if _native.C is None else _native.C.isa()
    yield
    torch.set_num_threads(threads)
    if _native.C is not None:
        _native.C.choose_isa(isa)


@pytest.fixture(autouse=True)
def poisoned_when_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a decoder's backward gives back is NaN from then on; of tensors this small the pages would stay."""

    def poison(t: Tensor | None) -> None:
        if t is not None:
            t.fill_(float("nan"))

    monkeypatch.setattr(decoder_native, "_free", poison)

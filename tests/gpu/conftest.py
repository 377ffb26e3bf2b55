"""TF32 is off where the fp64 oracle holds kernels to fp32's rounding; one test turns it on."""

from collections.abc import Iterator

import pytest
import torch

from tests.emulated import emulated
from tests.gpu.place import BACKEND, REHEARSES

__all__ = ["emulated", "needs_gpu", "no_tf32", "not_of_cuda", "rehearsed_on_cuda", "there_is_a_gpu"]


@pytest.fixture(scope="session", autouse=True)
def there_is_a_gpu() -> None:
    """Where a file of this folder is named without one."""
    if not REHEARSES and not torch.cuda.is_available():
        pytest.skip("needs a GPU; FASTSEQ_REHEARSE=1 has it run on the CPU")


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


@pytest.fixture(autouse=True)
def rehearsed_on_cuda(request: pytest.FixtureRequest) -> None:
    """On a CPU the CUDA kernels are emulated."""
    if REHEARSES and BACKEND == "cuda":
        request.getfixturevalue("emulated")


def not_of_cuda(reason: str) -> pytest.MarkDecorator:
    """Left out on the CUDA kernels: what a test is about is Triton's alone."""
    return pytest.mark.skipif(BACKEND == "cuda", reason=reason)


needs_gpu = pytest.mark.skipif(REHEARSES, reason="rehearsed on the CPU: this test needs a GPU")

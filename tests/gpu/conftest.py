"""TF32 is off where the fp64 oracle holds kernels to fp32's rounding; one test turns it on."""

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.place import REHEARSES


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


needs_gpu = pytest.mark.skipif(REHEARSES, reason="rehearsed on the CPU: this test needs a GPU")

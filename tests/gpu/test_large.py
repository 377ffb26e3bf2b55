"""More than 2**31 elements: addresses are int64 from their first product on."""

import pytest
import torch

import fastseq
from tests.gpu.conftest import not_of_cuda
from tests.gpu.place import BACKEND, DEVICE, REHEARSES

GIB = 1 << 30


def needs(gib: float) -> None:
    if not REHEARSES and torch.cuda.mem_get_info()[0] < gib * GIB:
        pytest.skip(f"needs a GPU with {gib} GiB free")


@pytest.fixture(autouse=True)
def memory_given_back() -> object:
    yield
    if not REHEARSES:
        torch.cuda.empty_cache()


def test_a_layer_of_more_elements_than_int32_counts() -> None:
    """Gates [T, B, 4 H] pass 2**31, and the last rows lie behind it."""
    T, B, H = (4, 6, 8) if REHEARSES else (520, 16_200, 64)
    needs(30)
    module = fastseq.LSTM(1, H, backend=BACKEND).to(DEVICE, torch.bfloat16)
    x = torch.randn(T, B, 1, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        out, (h_n, _) = module(x)
        alone, _ = module(x[:, -4:].contiguous())
    assert REHEARSES or 4 * out.numel() > 2**31
    torch.testing.assert_close(out[:, -4:], alone, rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(h_n[0], out[-1])


def test_saved_gates_of_more_elements_than_int32_counts() -> None:
    """What training keeps of a layer, and its gradients: those of the last rows are those of the rows alone."""
    T, B, H = (4, 6, 8) if REHEARSES else (520, 16_200, 64)
    needs(60)
    module = fastseq.LSTM(1, H, backend=BACKEND).to(DEVICE, torch.bfloat16)
    x = torch.randn(T, B, 1, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    alone = x[:, -4:].detach().clone().requires_grad_()
    (d_x,) = torch.autograd.grad(module(x)[0][:, -4:].sum(), x)
    (d_alone,) = torch.autograd.grad(module(alone)[0].sum(), alone)
    torch.testing.assert_close(d_x[:, -4:], d_alone, rtol=2**-5, atol=2**-5)
    assert not d_x[:, :-4].count_nonzero()


@not_of_cuda("attention of all queries at once is Triton's alone")
def test_an_attention_of_more_elements_than_int32_counts() -> None:
    """Weights [N, T, S]."""
    N, T, S, A = (6, 5, 7, 4) if REHEARSES else (132, 4096, 4096, 16)
    needs(30)
    module = fastseq.Attention(A, A, A, backend=BACKEND).to(DEVICE, torch.bfloat16)
    memory = torch.randn(N, S, A, device=DEVICE, dtype=torch.bfloat16)
    query = torch.randn(N, T, A, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        context, weights = module(query, module.prepare(fastseq.Memory(memory)), need_weights=True)
        last = module.prepare(fastseq.Memory(memory[-1:].contiguous()))
        alone, weights_alone = module(query[-1:].contiguous(), last, need_weights=True)
    assert weights is not None
    assert weights_alone is not None
    assert REHEARSES or weights.numel() > 2**31
    torch.testing.assert_close(context[-1:], alone, rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(weights[-1:], weights_alone, rtol=2**-6, atol=2**-6)

"""Attention, Decoder, Encoder and Seq2Seq in PyTorch's modes: against themselves on the reference, plain PyTorch."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.export import Dim, export
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq import _native
from tests.modes.cases import assert_same
from tests.modes.distributed import Loss, seq2seq, tokens

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

BACKENDS = ("cpu", "auto", "reference")
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trained(model: fastseq.Seq2Seq, loss: Callable[[], Tensor] | None = None) -> list[Tensor]:
    """The loss and every gradient."""
    value = model.loss(*tokens()) if loss is None else loss()
    return [value.detach(), *torch.autograd.grad(value, list(model.parameters()))]


def on_the_reference() -> list[Tensor]:
    return trained(seq2seq("reference"))


@backends
def test_func_grad(backend: str) -> None:
    model = Loss(seq2seq(backend))
    given = {n: p.detach() for n, p in model.named_parameters()}
    got = torch.func.grad(lambda p: functional_call(model, p, tokens()))(given)
    assert_same(list(got.values()), on_the_reference()[1:])


@backends
def test_double_backward(backend: str) -> None:
    """The norm of the gradient, differentiated."""
    found = []
    for name in (backend, "reference"):
        model = seq2seq(name)
        first = torch.autograd.grad(model.loss(*tokens()), list(model.parameters()), create_graph=True)
        norm = torch.stack([g.square().sum() for g in first]).sum()
        found.append(torch.autograd.grad(norm, list(model.parameters())))
    assert_same(found[0], found[1], 64)


@backends
def test_checkpoint_hooks_copies_and_averages(backend: str) -> None:
    model, expected = seq2seq(backend), on_the_reference()
    assert_same(trained(model), expected)
    wrapped = Loss(model)
    assert_same(trained(model, lambda: checkpoint(wrapped, *tokens(), use_reentrant=False)), trained(model), 0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model).module):
        assert_same(trained(twin), trained(model), 0)
    seen: list[str] = []
    for part in (model.encoder, model.decoder):
        part.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    assert_same(trained(model), expected)
    assert seen == ["Encoder", "Decoder"]


@backends
def test_deterministic_and_retained(backend: str) -> None:
    model = seq2seq(backend)
    expected, parameters = trained(model), list(model.parameters())
    torch.use_deterministic_algorithms(True)
    try:
        loss = model.loss(*tokens())
        for _ in range(2):
            again = torch.autograd.grad(loss, parameters, retain_graph=True)
            assert_same(again, expected[1:], 0)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_compiled_for_any_rows_and_lengths(backend: str) -> None:
    """The loss in one graph for every batch. (On the reference each T is a graph of its own.)"""
    model = seq2seq(backend)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, made = torch.compile(Loss(model), fullgraph=True, dynamic=True, backend=counter), []
    for b, s, t in ((4, 6, 5), (3, 6, 5), (5, 8, 7)):
        src, tgt = torch.randint(3, 11, (b, s)), torch.randint(3, 11, (b, t))
        tgt[:, 0] = 1
        got = trained(model, lambda src=src, tgt=tgt: compiled(src, tgt))
        assert_same(got, trained(model, lambda src=src, tgt=tgt: model.loss(src, tgt)))
        made.append(counter.frame_count)
    assert made[0] == made[-1]


class Logits(nn.Module):
    def __init__(self, model: fastseq.Seq2Seq) -> None:
        super().__init__()
        self.model = model

    def forward(self, src: Tensor, tgt: Tensor) -> Any:
        return self.model(src, tgt).logits


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_exported_with_dynamic_rows_and_lengths(backend: str) -> None:
    model, (src, tgt) = Logits(seq2seq(backend)).eval(), tokens()
    dynamic = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC})
    with torch.no_grad():
        program = export(model, (src, tgt), dynamic_shapes=dynamic)
        for b, s, t in ((3, 8, 4), (6, 2, 9)):
            given = torch.randint(3, 11, (b, s)), torch.randint(3, 11, (b, t))
            given[1][:, 0] = 1
            assert_same(program.module()(*given), model(*given))


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.stack([torch.autograd.grad(o, x, retain_graph=True)[0] for o in function(x)])


@backends
@pytest.mark.parametrize("part", ["attention", "decoder", "loss"])
def test_jacobians(part: str, backend: str) -> None:
    """Row by row, by jacrev and by batched gradients."""
    torch.manual_seed(2)
    attention = fastseq.Attention(5, 6, 7, backend=backend)
    decoder = fastseq.Decoder.luong(5, 6, memory_size=6, bridge="zero", backend=backend)
    memory, w, target = fastseq.Memory(torch.randn(2, 3, 6)), torch.randn(9, 5), torch.tensor([[3, 4], [0, 8]])
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "attention": lambda x: attention(x, attention.prepare(memory))[0].flatten(),
        "decoder": lambda x: decoder(x, memory).output.flatten(),
        "loss": lambda x: fastseq.functional.linear_cross_entropy(x, w, None, target, reduction="none").flatten(),
    }
    function, x = functions[part], torch.randn(2, 2, 5)
    expected = jacobian(function, x)
    assert_same(torch.func.jacrev(function)(x), expected)
    x.requires_grad_()
    out = function(x)
    assert_same(torch.autograd.grad(out, x, torch.eye(len(out)), is_grads_batched=True)[0], expected)


def test_per_sample_gradients_of_a_loss_are_refused_by_torch() -> None:
    """The loss looks at the tokens' values, which vmap forbids."""
    model, (src, tgt) = Loss(seq2seq("auto")), tokens()
    given = {n: p.detach() for n, p in model.named_parameters()}
    each = torch.func.vmap(lambda s, t: functional_call(model, given, (s[None], t[None])))
    with pytest.raises(RuntimeError, match=r"vmap: It looks like you're .* calling .item\(\)"):
        each(src, tgt)

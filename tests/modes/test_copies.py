"""Modules that are copied, stored, built without values, averaged and watched by hooks."""

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastseq
from tests.modes.cases import Case, H, Holder, I, assert_same, flatten, loss_of, results
from tests.modes.modes import ASSIGN, DEEPCOPY, EMA, HOOKS, META, PICKLE, SKIP_INIT

OPTIONS: dict[str, Any] = {"num_layers": 2, "bidirectional": True}


def same_module(twin: nn.Module, case: Case, module: nn.Module) -> None:
    assert type(twin) is getattr(fastseq, case.kind)
    assert twin.backend == case.backend
    assert_same(results(twin, case.input()), results(module, case.input()), 0)


@DEEPCOPY
def test_copies(case: Case) -> None:
    """A deep copy has parameters of its own, a shallow one the same."""
    module = case.fast(**OPTIONS)
    deep, shallow = copy.deepcopy(module), copy.copy(module)
    for twin in (deep, shallow):
        same_module(twin, case, module)
    with torch.no_grad():
        next(module.parameters()).zero_()
    assert_same(results(shallow, case.input()), results(module, case.input()), 0)
    assert not torch.equal(flatten(deep(case.input()))[0], flatten(module(case.input()))[0])


@PICKLE
def test_pickles_and_files(case: Case) -> None:
    """The whole module, and a state_dict that torch.load reads with weights_only, into torch.nn's module and back."""
    module, stock = case.fast(**OPTIONS), case.twins(**OPTIONS)[0]
    same_module(pickle.loads(pickle.dumps(module)), case, module)
    for value, weights_only in ((module, False), (module.state_dict(), True)):
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=weights_only)
        if not weights_only:
            same_module(loaded, case, module)
            continue
        with torch.no_grad():
            next(stock.parameters()).zero_()
        assert stock.load_state_dict(loaded).missing_keys == []
        assert_same(flatten(stock(case.input())), flatten(module(case.input())))


@ASSIGN
def test_built_on_meta_then_assigned(case: Case) -> None:
    """No memory until the weights come, and then theirs: load_state_dict(assign=True)."""
    module = case.fast(**OPTIONS)
    with torch.device("meta"):
        empty = case.fast(**OPTIONS)
    assert all(p.is_meta for p in empty.parameters())
    state = module.state_dict()
    empty.load_state_dict(state, assign=True)
    assert [p.data_ptr() for p in empty.parameters()] == [t.data_ptr() for t in state.values()]
    same_module(empty, case, module)
    with torch.device("meta"):
        filled = case.fast(**OPTIONS)
    filled = filled.to_empty(device="cpu")
    filled.load_state_dict(state)
    same_module(filled, case, module)


@META
def test_shapes_on_meta(case: Case) -> None:
    """Of outputs and gradients, without values."""
    module, x = case.fast(**OPTIONS), case.input().requires_grad_()
    shapes = [t.shape for t in flatten(module(x))]
    module, x = module.to("meta"), x.detach().to("meta").requires_grad_()
    outputs = flatten(module(x))
    assert all(o.is_meta for o in outputs)
    assert [o.shape for o in outputs] == shapes
    outputs[0].sum().backward()
    assert x.grad is not None
    assert x.grad.is_meta


@SKIP_INIT
def test_skip_init(case: Case) -> None:
    """torch looks for `device` in the constructor's signature, which torch.nn.LSTM's has not."""
    kind, module = getattr(fastseq, case.kind), case.fast()
    empty = nn.utils.skip_init(kind, I, H, **case.options)
    assert [p.shape for p in empty.parameters()] == [p.shape for p in module.parameters()]
    assert all(p.device.type == "cpu" for p in empty.parameters())
    empty.load_state_dict(module.state_dict())
    same_module(empty, case, module)


@EMA
def test_averaged_model(case: Case) -> None:
    """An exponential moving average of parameters: the module's results with those."""
    module = case.fast()
    model = Holder(module)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.update_parameters(model)  # the first one copies
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    average.update_parameters(model)
    with torch.no_grad():
        for p, b in zip(model.parameters(), before, strict=True):
            p.copy_(b.lerp(b + 1, 0.25))
    assert_same(flatten(average(case.input())), flatten(model(case.input())))


@HOOKS
def test_hooks(case: Case) -> None:
    """Each is called once, in torch's order, may change what it sees, and full ones see every gradient."""
    stock, fast = case.twins()
    seen = [watched(m, case.input()) for m in (stock, fast)]
    assert seen[0][0] == seen[1][0] == ["forward_pre", "forward", "backward_pre", "backward"]
    assert_same(seen[1][1], seen[0][1])


def watched(module: nn.Module, x: Tensor) -> tuple[list[str], list[Tensor]]:
    order: list[str] = []
    found: list[Tensor] = []

    def note(name: str, *values: Any) -> None:
        order.append(name)
        found.extend(t.detach().clone() for t in flatten(values) if isinstance(t, Tensor))

    def forward_pre(m: nn.Module, args: Any) -> Any:
        note("forward_pre", args)
        return (args[0] * 2,)

    def forward(m: nn.Module, args: Any, output: Any) -> Any:
        note("forward", args, output)
        return torch.utils._pytree.tree_map(lambda t: t * 3, output)

    def backward_pre(m: nn.Module, grads: Any) -> Any:
        note("backward_pre", grads)
        return tuple(None if g is None else g * 5 for g in grads)

    module.register_forward_pre_hook(forward_pre)
    module.register_forward_hook(forward)
    module.register_full_backward_pre_hook(backward_pre)
    module.register_full_backward_hook(lambda m, inner, outer: note("backward", inner, outer))
    leaf = x.clone().requires_grad_()
    loss_of(module(leaf)).backward()
    assert leaf.grad is not None
    return order, [*found, leaf.grad, *(p.grad for p in module.parameters() if p.grad is not None)]

"""How a module's weights change, by every means of PyTorch's that something counts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

__all__ = ["CHANGES", "in_place", "swapped", "transposed"]


class Writer(torch.optim.Optimizer):
    """As optimizers were written before torch.no_grad."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-group["lr"])


def step_with(optimizer: Callable[..., Any], **options: Any) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        optimizer(module.parameters(), **options).step()

    return change


def in_place(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).mul_(2)


def in_inference(module: nn.Module) -> None:
    with torch.inference_mode():
        next(module.parameters()).mul_(2)


def only_w_hh(module: nn.Module) -> None:
    with torch.no_grad():
        list(module.parameters())[1][-1, -1] += 1


def new_data(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = p.data * 2


def new_data_twice(module: nn.Module) -> None:
    """The second could lie where the first weights lay, were their memory not held."""
    for p in module.parameters():
        shape = p.shape
        p.data = torch.zeros(0)
        p.data = torch.full(shape, 0.01)


def new_parameter(module: nn.Module) -> None:
    name, p = next(module.named_parameters())
    setattr(module, name, nn.Parameter(p.detach() * 2))


def same_memory(module: nn.Module) -> None:
    """Another parameter at the same address, after as many writes."""
    name, old = next(module.named_parameters())
    new = nn.Parameter(old.data)
    setattr(module, name, new)
    with torch.no_grad():
        while new._version < old._version:
            new.mul_(2)
    assert (new._version, new.data_ptr()) == (old._version, old.data_ptr())


def transposed(module: nn.Module) -> None:
    """The same address, shape and version."""
    w = next(p for p in module.parameters() if p.dim() == 2 and p.shape[0] == p.shape[1])
    w.data = w.data.t()


def loaded(module: nn.Module, assign: bool = False) -> None:
    module.load_state_dict({n: p * 2 for n, p in module.state_dict().items()}, assign=assign)


def swapped(module: nn.Module) -> None:
    w = next(module.parameters())
    torch.utils.swap_tensors(w, nn.Parameter(w.detach() * 2))


CHANGES = {
    "adam": step_with(torch.optim.Adam, lr=0.1),
    "adam_foreach": step_with(torch.optim.Adam, lr=0.1, foreach=True),
    "adam_fused": step_with(torch.optim.Adam, lr=0.1, fused=True),
    "sgd_fused": step_with(torch.optim.SGD, lr=0.1, fused=True),
    "optimizer_writing_data": step_with(Writer, defaults={"lr": 0.1}),
    "loaded_assign": partial(loaded, assign=True),
    "shared": lambda module: in_place(module.share_memory()),
    "rounded": lambda module: module.bfloat16().float(),
} | {f.__name__: f for f in (
    in_place, in_inference, only_w_hh, new_data, new_data_twice, new_parameter, same_memory, loaded, swapped,
)}  # fmt: skip

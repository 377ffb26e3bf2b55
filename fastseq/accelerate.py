"""Turn a model's torch.nn recurrent modules, and toolkits' decoders, into fastseq's, in place."""

from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from .interop.adapters import Adapter
from .interop.registry import adapter_of, known, why_not
from .modules.dropin import DROP_INS
from .modules.frozen import KEY

__all__ = ["Change", "Report", "accelerate"]

_FAST = {stock: pair.fast for stock, pair in DROP_INS.items()}
_STOCK = {fast: stock for stock, fast in _FAST.items()}
_MARK = "_fastseq_accelerated"  # in the instances that accelerate changed, so that undo leaves others alone


class Change(NamedTuple):
    """What became of one recurrent module."""

    name: str  # as in model.named_modules(); "" is the model itself
    action: str  # "accelerated" | "reverted" | "skipped"
    reason: str


class Report(list[Change]):
    """One Change for each recurrent module of the model; str() is a table."""

    def __str__(self) -> str:
        width = max((len(c.name) for c in self), default=0)
        return "\n".join(f"{c.action:<11} {c.name or '(model)':<{max(width, 7)}} {c.reason}" for c in self)


def accelerate(model: nn.Module, undo: bool = False) -> Report:
    """Make every torch.nn.LSTM, GRU, LSTMCell and GRUCell within `model` a fastseq one, in place; undo=True reverts it.

    Only the class of the instances changes: parameters, buffers, hooks and training mode stay as they are, and a module
    shared by several parents is changed for all. Subclasses are left alone (their code may rely on torch's forward),
    and so are parametrized modules; `fastseq.patch()` serves both.

    Also JoeyNMT's RecurrentEncoder and RecurrentDecoder, OpenNMT-py's InputFeedRNNDecoder and fairseq's LSTMDecoder,
    whose steps then run as one operator: signatures, state_dict and isinstance stay, and on the CPU random draws do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    change = _revert if undo else _swap
    found = (change(name, module) for name, module in model.named_modules())
    return Report(c for c in found if c is not None)


def _swap(name: str, module: nn.Module) -> Change | None:
    kind = type(module)
    if kind in _FAST:
        module.__class__ = _FAST[kind]
        setattr(module, _MARK, True)
        return Change(name, "accelerated", f"torch.nn.{kind.__name__} is now fastseq.{kind.__name__}")
    if kind in _STOCK:
        return Change(name, "skipped", f"is a fastseq.{kind.__name__} already")
    if isinstance(module, tuple(_STOCK)):
        return Change(name, "skipped", f"{kind.__name__} is a subclass of a fastseq module already")
    if not isinstance(module, tuple(_FAST)):
        return _adapt(name, module)
    if parametrize.is_parametrized(module):
        return Change(name, "skipped", "is parametrized; use fastseq.patch(), or accelerate before parametrizing")
    return Change(name, "skipped", f"{kind.__module__}.{kind.__qualname__} is a subclass; use fastseq.patch()")


def _adapt(name: str, module: nn.Module) -> Change | None:
    """A toolkit's encoder or decoder."""
    kind = type(module)
    if isinstance(module, Adapter):
        return Change(name, "skipped", f"{_full(module.stock)} is accelerated already")
    part = known(kind)
    if part is None:
        base = next((base for base in kind.__mro__ if known(base) is not None), None)
        return None if base is None else Change(name, "skipped", f"{_full(kind)} is a subclass of {_full(base)}")
    why = why_not(part, module)
    if why is not None:
        return Change(name, "skipped", f"{_full(kind)}: {why}")
    module.__class__ = adapter_of(kind)
    setattr(module, _MARK, True)
    return Change(name, "accelerated", f"{_full(kind)} runs its steps as one operator")


def _full(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _revert(name: str, module: nn.Module) -> Change | None:
    kind: Any = type(module)
    if isinstance(module, Adapter):
        module.__dict__.pop(_MARK, None)
        module.__class__ = kind.stock
        return Change(name, "reverted", f"{_full(kind.stock)} is itself again")
    if kind not in _STOCK:
        return None
    if _MARK not in module.__dict__:
        return Change(name, "skipped", f"was built as fastseq.{kind.__name__}")
    delattr(module, _MARK)
    module.__dict__.pop(KEY, None)
    module.__class__ = _STOCK[kind]
    return Change(name, "reverted", f"fastseq.{kind.__name__} is torch.nn.{kind.__name__} again")

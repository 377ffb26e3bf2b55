"""Keep the packed weights of a model's recurrent layers from one call to the next."""

from typing import Any, TypeVar

from torch import nn

from .errors import InputError
from .modules.dropin import DROP_INS
from .modules.frozen import KEY, Frozen
from .patch import patched

__all__ = ["freeze", "unfreeze"]

M = TypeVar("M", bound=nn.Module)

_OURS = tuple(pair.fast for pair in DROP_INS.values())
_STOCK = tuple(DROP_INS)  # while fastseq.patch() is in force


def freeze(model: M) -> M:
    """Speed up inference on the CPU: every fastseq LSTM, GRU, RNN and cell within `model` keeps packed weights.

    In place; returns `model`. The fused CPU kernels multiply by weights in a layout of their own, which a call makes
    and forgets. A frozen layer makes it in its first call without gradients and keeps it: one more copy of its weights
    in memory, until `fastseq.unfreeze`.

    Nothing else changes. Calls that record gradients, other backends, devices and dtypes, autocast, torch.compile and
    torch.func run as before; `fastseq.explain` says whether a call uses what is kept. Results are the unfrozen layer's,
    to the bit where that packs too. Where it reads the weights as they stand (single steps; with AVX-512 also up to 64
    steps in all, from 192 features on) sums are taken in another order and differ by rounding.

    Changed weights are noticed, and the next call packs them again: an optimizer's step, `load_state_dict`, `.to()`,
    in-place operations, another parameter or `.data` in a parameter's place. What PyTorch counts nowhere is not
    noticed: values written by other code than an optimizer through `.data` (`w.data.mul_(2)`), through NumPy or by
    another process. After that, call `freeze` again.

    Copies and pickles of a frozen module are not frozen, and no file has packed weights. Within `fastseq.patch()`,
    torch.nn's own layers are frozen too. Raises InputError where there is nothing to freeze.

    >>> model = fastseq.freeze(model.eval())
    >>> with torch.no_grad():
    ...     model(x)
    """
    layers = _layers(model, (*_OURS, *_STOCK) if patched() else _OURS)
    if not layers:
        raise InputError(
            f"no fastseq LSTM, GRU, RNN or cell of these within {type(model).__name__}; "
            "build it of them, or call fastseq.accelerate(model) first"
        )
    for layer in layers:
        directions = 2 if getattr(layer, "bidirectional", False) else 1
        layer.__dict__[KEY] = Frozen.of(getattr(layer, "num_layers", 1), directions)
    return model


def unfreeze(model: M) -> M:
    """Undo `freeze`: every layer within `model` packs its weights in each call again. In place; returns `model`."""
    for layer in _layers(model, _STOCK):
        layer.__dict__.pop(KEY, None)
    return model


def _layers(model: Any, kinds: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return [module for module in model.modules() if isinstance(module, kinds)]

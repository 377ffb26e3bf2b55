"""Layer normalisation's parameters in a recurrent module: names, values at the start, what cannot have them."""

from typing import Any

from torch import Tensor, nn

from ..errors import InputError

__all__ = ["add_norms", "norms_of", "reset_norms"]

_NAMES = "_norm_names"  # in the module's __dict__, in the order of `RnnCall.norms`


def add_norms(module: Any) -> None:
    """Give an LSTM or GRU its gains [G*H] of both products, an LSTM the gain and bias [H] of N(c); for each layer and
    direction, in the dtype and on the device of its weights. InputError where no layer could be made of them.
    """
    kind = type(module).__name__
    if module.mode.startswith("RNN"):
        raise InputError(
            f"layer_norm=True of {kind}, whose paper normalises the sum of both products (Ba 2016, eq. 4), which no "
            "backend does; use fastseq.LSTM or fastseq.GRU"
        )
    if module.proj_size:
        raise InputError(f"layer_norm=True with proj_size={module.proj_size}; use one of the two")
    names = []
    for layer in range(module.num_layers):
        for way in ("", "_reverse") if module.bidirectional else ("",):
            w_hh: Tensor = getattr(module, f"weight_hh_l{layer}{way}")
            sizes = {"norm_ih": w_hh.shape[0], "norm_hh": w_hh.shape[0]}
            if module.mode == "LSTM":
                sizes |= {"norm_c": module.hidden_size, "norm_c_bias": module.hidden_size}
            for name, size in sizes.items():
                names.append(f"{name}_l{layer}{way}")
                module.register_parameter(names[-1], nn.Parameter(w_hh.new_empty(size)))
    module.__dict__[_NAMES] = names
    reset_norms(module)


def reset_norms(module: Any) -> None:
    """Gains of 1, biases of 0; nothing is drawn."""
    for name in module.__dict__.get(_NAMES, ()):
        nn.init.constant_(getattr(module, name), 0.0 if name.startswith("norm_c_bias") else 1.0)


def norms_of(module: Any) -> list[Tensor] | None:
    """As they are now, for an `RnnCall`; None of a module without."""
    if not getattr(module, "layer_norm", False):
        return None
    names = module.__dict__.get(_NAMES)
    if names is None:
        raise InputError(
            "layer_norm=True set later, but it has parameters of its own, which are made when the layer is built: build"
            f" one with layer_norm=True, such as fastseq.{type(module).__name__}(..., layer_norm=True)"
        )
    return [getattr(module, name) for name in names]

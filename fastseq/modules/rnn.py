"""fastseq.LSTM, fastseq.GRU and fastseq.RNN: torch.nn's modules with another forward.

Arguments, parameters, their order and initial values, state_dict and answers are torch.nn's. The forwards need nothing
but what torch.nn's own __init__ leaves in an instance, since `accelerate` and `patch` give them to such instances.
"""

from typing import Any, overload

from torch import Tensor, device, dtype, nn
from torch.nn.utils.rnn import PackedSequence

from ..backends.call import RnnCall
from ..dispatch import check_name
from ..engine import run
from ..functional import Lengths, state_pair
from .frozen import frozen

__all__ = ["GRU", "LSTM", "RNN", "backend_repr", "gru_call", "lstm_call", "rnn_call"]

LstmState = tuple[Tensor, Tensor]


def lstm_call(module: nn.LSTM, input: Any, hx: LstmState | None) -> RnnCall:
    """The call that `module` makes of (input, hx)."""
    h0, c0 = state_pair(hx)
    return RnnCall(
        "lstm", input, h0, c0, _weights(module), None, None, module.bias, module.num_layers, module.dropout,
        module.training, module.bidirectional, module.batch_first, module.proj_size, frozen=frozen(module),
    )  # fmt: skip


def gru_call(module: nn.GRU, input: Any, hx: Tensor | None) -> RnnCall:
    """The call that `module` makes of (input, hx)."""
    return _call("gru", module, input, hx)


def rnn_call(module: nn.RNN, input: Any, hx: Tensor | None) -> RnnCall:
    """The call that `module` makes of (input, hx)."""
    return _call(module.mode.lower(), module, input, hx)


def _call(cell: str, module: nn.RNNBase, input: Any, hx: Tensor | None) -> RnnCall:
    return RnnCall(
        cell, input, hx, None, _weights(module), None, None, module.bias, module.num_layers, module.dropout,
        module.training, module.bidirectional, module.batch_first, frozen=frozen(module),
    )  # fmt: skip


def _weights(module: nn.RNNBase) -> list[Tensor]:
    """The flat weights as they are now; a parametrized or functionally replaced one is no parameter of the module."""
    names, parameters = module._flat_weights_names, module._parameters
    try:
        return [parameters[name] for name in names]  # type: ignore[misc]  # getattr costs 0.4 us each
    except KeyError:
        return [getattr(module, name) for name in names]


class LSTM(nn.LSTM):
    """torch.nn.LSTM, faster: the same arguments, parameters, state_dict, results and random draws.

    backend: "auto" (the fastest that can run the call), or the name of one of `fastseq.backends()`, which then runs or
    raises InputError. `forward` also takes lengths [B] for padded rows, in any order, and resets within a sequence.
    """

    backend: str = "auto"  # a class default: instances made by torch.nn have no such attribute

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = ...,
        bias: bool = ...,
        batch_first: bool = ...,
        dropout: float = ...,
        bidirectional: bool = ...,
        proj_size: int = ...,
        device: device | str | None = ...,
        dtype: dtype | None = ...,
        *,
        backend: str = ...,
    ) -> None: ...
    @overload
    def __init__(self, *args: Any, backend: str = ..., **kwargs: Any) -> None: ...
    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        check_name(backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    @overload
    def forward(
        self, input: Tensor, hx: LstmState | None = ..., *, lengths: Lengths = ..., resets: Tensor | None = ...
    ) -> tuple[Tensor, LstmState]: ...
    @overload
    def forward(self, input: PackedSequence, hx: LstmState | None = ...) -> tuple[PackedSequence, LstmState]: ...
    def forward(
        self, input: Any, hx: LstmState | None = None, *, lengths: Lengths = None, resets: Tensor | None = None
    ) -> tuple[Any, LstmState]:
        """(output, (h_n, c_n)) of input [T, B, I] ([B, T, I] if batch_first), [T, I], or a PackedSequence.

        lengths [B]: what stands behind a row's length is never read, its output is 0, and h_n, c_n are its last states.
        resets, bool, the input's leading dimensions: True where a segment of the row begins, such as an episode. The
        state, hx included, is zeroed before that step; of the reverse direction before the step in front of it. So
        segments give what they give alone: hx enters the first one, forward, and in reverse the last one.
        Raises InputError or TypeError, naming the argument.
        """
        return run(lstm_call(self, input, hx), self.backend, lengths, resets)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return super().extra_repr() + backend_repr(self)


class GRU(nn.GRU):
    """torch.nn.GRU, faster: the same arguments, parameters, state_dict, results and random draws.

    backend, lengths and resets as for `LSTM`.
    """

    backend: str = "auto"

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = ...,
        bias: bool = ...,
        batch_first: bool = ...,
        dropout: float = ...,
        bidirectional: bool = ...,
        device: device | str | None = ...,
        dtype: dtype | None = ...,
        *,
        backend: str = ...,
    ) -> None: ...
    @overload
    def __init__(self, *args: Any, backend: str = ..., **kwargs: Any) -> None: ...
    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        check_name(backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = ..., *, lengths: Lengths = ..., resets: Tensor | None = ...
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = ...) -> tuple[PackedSequence, Tensor]: ...
    def forward(
        self, input: Any, hx: Tensor | None = None, *, lengths: Lengths = None, resets: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        """(output, h_n); input, lengths, resets and faults as for `LSTM.forward`."""
        out, (h,) = run(gru_call(self, input, hx), self.backend, lengths, resets)
        return out, h

    def extra_repr(self) -> str:
        return super().extra_repr() + backend_repr(self)


class RNN(nn.RNN):
    """torch.nn.RNN (Elman 1990; nonlinearity "tanh" or "relu"), faster: the same arguments, parameters and results.

    backend, lengths and resets as for `LSTM`.
    """

    backend: str = "auto"

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = ...,
        nonlinearity: str = ...,
        bias: bool = ...,
        batch_first: bool = ...,
        dropout: float = ...,
        bidirectional: bool = ...,
        device: device | str | None = ...,
        dtype: dtype | None = ...,
        *,
        backend: str = ...,
    ) -> None: ...
    @overload
    def __init__(self, *args: Any, backend: str = ..., **kwargs: Any) -> None: ...
    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        check_name(backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = ..., *, lengths: Lengths = ..., resets: Tensor | None = ...
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = ...) -> tuple[PackedSequence, Tensor]: ...
    def forward(
        self, input: Any, hx: Tensor | None = None, *, lengths: Lengths = None, resets: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        """(output, h_n); input, lengths, resets and faults as for `LSTM.forward`."""
        out, (h,) = run(rnn_call(self, input, hx), self.backend, lengths, resets)
        return out, h

    def extra_repr(self) -> str:
        return super().extra_repr() + backend_repr(self)


def backend_repr(module: Any) -> str:
    """What a module's repr says of its backend: nothing while it is auto."""
    return "" if module.backend == "auto" else f", backend={module.backend!r}"

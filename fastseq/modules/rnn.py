"""fastseq.LSTM, fastseq.GRU and fastseq.RNN: torch.nn's modules with another forward.

Arguments, parameters, their order and initial values, state_dict and answers are torch.nn's. The forwards need nothing
but what torch.nn's own __init__ leaves in an instance, since `accelerate` and `patch` give them to such instances.
"""

from typing import Any, ClassVar, overload

from torch import Tensor, device, dtype, nn
from torch.nn.utils.rnn import PackedSequence

from ..backends.call import RnnCall
from ..config import part
from ..functional import Lengths, state_pair
from .frozen import frozen
from .modes import serves_modes
from .norm import norms_of
from .recurrent import Recurrent, first_state, noise_of

__all__ = ["GRU", "LSTM", "RNN", "gru_call", "lstm_call", "rnn_call"]

LstmState = tuple[Tensor, Tensor]


def lstm_call(module: nn.LSTM, input: Any, hx: LstmState | None) -> RnnCall:
    """The call that `module` makes of (input, hx)."""
    h0, c0 = state_pair(first_state(module, input) if hx is None else hx)
    return RnnCall(
        "lstm", input, h0, c0, _weights(module), None, None, module.bias, module.num_layers, module.dropout,
        module.training, module.bidirectional, module.batch_first, module.proj_size, noise=noise_of(module),
        norms=norms_of(module), frozen=frozen(module),
    )  # fmt: skip


def gru_call(module: nn.GRU, input: Any, hx: Tensor | None) -> RnnCall:
    """The call that `module` makes of (input, hx)."""
    return _call("gru", module, input, hx)


def rnn_call(module: nn.RNN, input: Any, hx: Tensor | None) -> RnnCall:
    """The call that `module` makes of (input, hx)."""
    return _call(module.mode.lower(), module, input, hx)


def _call(cell: str, module: nn.RNNBase, input: Any, hx: Tensor | None) -> RnnCall:
    hx = first_state(module, input) if hx is None else hx
    return RnnCall(
        cell, input, hx, None, _weights(module), None, None, module.bias, module.num_layers, module.dropout,
        module.training, module.bidirectional, module.batch_first, noise=noise_of(module), norms=norms_of(module),
        frozen=frozen(module),
    )  # fmt: skip


def _weights(module: nn.RNNBase) -> list[Tensor]:
    """The flat weights as they are now; a parametrized or functionally replaced one is no parameter of the module."""
    names, parameters = module._flat_weights_names, module._parameters
    try:
        return [parameters[name] for name in names]  # type: ignore[misc]  # getattr costs 0.4 us each
    except KeyError:
        return [getattr(module, name) for name in names]


@part
@serves_modes
class LSTM(Recurrent, nn.LSTM):
    """torch.nn.LSTM, faster: the same arguments, parameters, state_dict, results and random draws.

    backend: "auto" (the fastest that can run the call), or the name of one of `fastseq.backends()`, which then runs or
    raises InputError. `forward` also takes lengths [B] for padded rows, in any order, and resets within a sequence.

    zoneout: the probability that a unit of h and of c keeps its value of the step before, or (that of h, that of c);
    in evaluation so much of the old value is mixed in (Krueger et al. 2016).
    recurrent_dropout: in training, of h on its way into W_hh, one mask for all steps of a row (Gal and Ghahramani
    2016); with recurrent_dropout_on="update" of what a step writes into c, a mask for every step (Semeniuta et al.
    2016).
    layer_norm: both products are normalised before they are added, and c on its way into h (Ba, Kiros and Hinton 2016,
    eq. 20 to 22; eps 1e-5). Parameters norm_ih_l0, norm_hh_l0 [4H] and norm_c_l0 [H] are gains, at first 1,
    norm_c_bias_l0 [H] is a bias, at first 0, one each a layer and direction; the other biases are bias_ih and bias_hh.
    InputError with proj_size.
    learn_state: parameters initial_h [L*D, P] and initial_c [L*D, H], at first 0, take the place of zeros where hx is
    None; resets begin from zeros, so the two are refused together. Raises InputError for probabilities outside [0, 1).
    """

    ARGUMENTS: ClassVar[dict[str, Any]] = Recurrent.ARGUMENTS | {"proj_size": int}

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
        zoneout: float | tuple[float, float] = ...,
        recurrent_dropout: float = ...,
        recurrent_dropout_on: str = ...,
        learn_state: bool = ...,
        layer_norm: bool = ...,
        backend: str = ...,
    ) -> None: ...
    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    @overload
    def forward(
        self, input: Tensor, hx: LstmState | None = ..., *, lengths: Lengths = ..., resets: Tensor | None = ...
    ) -> tuple[Tensor, LstmState]: ...
    @overload
    def forward(self, input: PackedSequence, hx: LstmState | None = ...) -> tuple[PackedSequence, LstmState]: ...
    # Of ours, lengths and resets are given by name; torch.onnx gives every default of forward by position.
    def forward(
        self, input: Any, hx: LstmState | None = None, lengths: Lengths = None, resets: Tensor | None = None
    ) -> tuple[Any, LstmState]:
        """(output, (h_n, c_n)) of input [T, B, I] ([B, T, I] if batch_first), [T, I], or a PackedSequence.

        lengths [B]: what stands behind a row's length is never read, its output is 0, and h_n, c_n are its last states.
        resets, bool, the input's leading dimensions: True where a segment of the row begins, such as an episode. The
        state, hx included, is zeroed before that step; of the reverse direction before the step in front of it. So
        segments give what they give alone: hx enters the first one, forward, and in reverse the last one.
        Raises InputError or TypeError, naming the argument.
        """
        return self._run(lstm_call(self, input, hx), lengths, resets)

    @overload
    def forward_states(
        self, input: Tensor, hx: LstmState | None = ..., *, lengths: Lengths = ..., resets: Tensor | None = ...
    ) -> tuple[Tensor, LstmState, Tensor]: ...
    @overload
    def forward_states(
        self, input: PackedSequence, hx: LstmState | None = ...
    ) -> tuple[PackedSequence, LstmState, PackedSequence]: ...
    def forward_states(
        self, input: Any, hx: LstmState | None = None, *, lengths: Lengths = None, resets: Tensor | None = None
    ) -> tuple[Any, LstmState, Any]:
        """(output, (h_n, c_n), cells): `forward`, and c after every step of the last layer, as output has its h.

        cells have D * hidden_size features in the input's layout, 0 behind a row's length; gradients flow through them.
        """
        call = lstm_call(self, input, hx)
        call.states = True
        return self._run(call, lengths, resets)


@part
@serves_modes
class GRU(Recurrent, nn.GRU):
    """torch.nn.GRU, faster: the same arguments, parameters, state_dict, results and random draws.

    All else as for `LSTM`, but that there is no c: zoneout is one probability, and recurrent_dropout_on="update" drops
    of the candidate n. layer_norm normalises r and z together, and n by itself, of either product: n is
    tanh(norm_ih N(W_n x) + b_in + r (norm_hh N(U_n h) + b_hn)); norm_ih_l0, norm_hh_l0 [3H] are all its parameters.
    """

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
        zoneout: float = ...,
        recurrent_dropout: float = ...,
        recurrent_dropout_on: str = ...,
        learn_state: bool = ...,
        layer_norm: bool = ...,
        backend: str = ...,
    ) -> None: ...
    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = ..., *, lengths: Lengths = ..., resets: Tensor | None = ...
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = ...) -> tuple[PackedSequence, Tensor]: ...
    def forward(
        self, input: Any, hx: Tensor | None = None, lengths: Lengths = None, resets: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        """(output, h_n); input, lengths, resets and faults as for `LSTM.forward`."""
        out, (h,) = self._run(gru_call(self, input, hx), lengths, resets)
        return out, h


@part
@serves_modes
class RNN(Recurrent, nn.RNN):
    """torch.nn.RNN (Elman 1990; nonlinearity "tanh" or "relu"), faster: the same arguments, parameters and results.

    All else as for `LSTM`, but that there is no c: zoneout is one probability, and recurrent_dropout_on="state" all
    there is.
    """

    ARGUMENTS: ClassVar[dict[str, Any]] = Recurrent.ARGUMENTS | {"nonlinearity": str}

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
        zoneout: float = ...,
        recurrent_dropout: float = ...,
        recurrent_dropout_on: str = ...,
        learn_state: bool = ...,
        backend: str = ...,
    ) -> None: ...
    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = ..., *, lengths: Lengths = ..., resets: Tensor | None = ...
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = ...) -> tuple[PackedSequence, Tensor]: ...
    def forward(
        self, input: Any, hx: Tensor | None = None, lengths: Lengths = None, resets: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        """(output, h_n); input, lengths, resets and faults as for `LSTM.forward`."""
        out, (h,) = self._run(rnn_call(self, input, hx), lengths, resets)
        return out, h

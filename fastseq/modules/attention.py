"""fastseq.Attention: a memory projected once, then scores, masked softmax and context for any number of queries.

additive   v . tanh(W_q q + W_m m)       Bahdanau et al. 2014, A.1.2; with query_bias + b, as tensorflow/nmt and Nematus
concat     v . tanh(W [q; m])            Luong et al. 2015, eq. 8: the same form, drawn as one matrix W
general    q . W m                       Luong et al. 2015, eq. 8
dot        q . m                         Luong et al. 2015, eq. 8
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..backends.decoder_call import AttentionCall
from ..checks import need_tensor
from ..config import described, part
from ..decoder_checks import check_mask
from ..decoding import run_attention
from ..dispatch import check_name
from ..engine import autocast_dtype
from ..errors import InputError
from ..spec import AttentionParams, Keys, Memory, one_of
from .modes import not_scriptable
from .recurrent import backend_repr

__all__ = ["Attention", "AttentionMaker", "LocalP", "check_memory", "need_dtype", "parameter", "uniform"]

SCORES = ("additive", "dot", "general", "concat")


@part
@dataclass(frozen=True)
class LocalP:
    """The window of Luong et al. 2015, section 3.2 (local-p): D positions on either side of a predicted one."""

    D: int

    def __post_init__(self) -> None:
        if not isinstance(self.D, int) or isinstance(self.D, bool) or self.D < 1:
            raise InputError(f"D={self.D!r} of LocalP; it is an int of at least 1")

    def config(self) -> dict[str, Any]:
        """The arguments that build it again, as plain data."""
        return described(self)


@part
class Attention(nn.Module):
    """One score, of those above, between queries of `query_size` features and a memory of `memory_size`.

    attn_size: units A of an additive or concat score; None: query_size. query_bias: a bias b within the tanh.
    normalize: g v / |v| in the place of v, g from sqrt(1 / A) (tensorflow/nmt's normed Bahdanau; Salimans and Kingma
    2016). scale, of a dot or general score: a factor, or "learned", from 1 (tensorflow/nmt's scaled Luong). window:
    None, or LocalP(D) for eq. 9 and 10 of Luong et al. 2015. backend as for `fastseq.LSTM`.

    Parameters: weight_memory [A, D] ([Q, D] if general), weight_query [A, Q], bias [A], v [A], g [], scale [],
    weight_window [A, Q] and v_window [A]; those that the options call for. They start as nn.Linear's.
    """

    __prepare_scriptable__ = not_scriptable
    backend: str = "auto"

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        attn_size: int | None = None,
        *,
        score: str = "additive",
        query_bias: bool = False,
        normalize: bool = False,
        scale: float | str | None = None,
        window: LocalP | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("score", score, SCORES)
        self.query_size, self.memory_size, self.score = query_size, memory_size, score
        self.additive = score in ("additive", "concat")
        self.attn_size = query_size if attn_size is None else attn_size
        self.normalize, self.factor, self.window = normalize, scale if isinstance(scale, float | int) else None, window
        self.backend = check_name(backend)
        self._check(query_bias, scale)
        units, factory = self.attn_size, {"device": device, "dtype": dtype}

        def add(name: str, wanted: bool, *shape: int) -> None:
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)) if wanted else None)  # type: ignore[arg-type]

        add("weight_memory", score != "dot", units, memory_size)
        add("weight_query", self.additive, units, query_size)
        add("bias", query_bias, units)
        add("v", self.additive, units)
        add("g", normalize)
        add("scale", scale == "learned")
        add("weight_window", window is not None, units, query_size)
        add("v_window", window is not None, units)
        self.reset_parameters()

    def _check(self, query_bias: bool, scale: Any) -> None:
        """Refuse what no score computes."""
        q, m, score = self.query_size, self.memory_size, self.score
        for name, size in (("query_size", q), ("memory_size", m), ("attn_size", self.attn_size)):
            if size < 1:
                raise InputError(f"{name}={size}; it is at least 1")
        if score == "dot" and q != m:
            raise InputError(
                f"score='dot' with query_size={q}, memory_size={m}: their product needs one size; use score='general',"
                " which maps the memory"
            )
        if not self.additive and self.attn_size != q:
            raise InputError(
                f"attn_size={self.attn_size} with score={score!r}, whose units are those of the query,"
                f" query_size={q}; leave it out, or use score='additive'"
            )
        for name, given in (("query_bias", query_bias), ("normalize", self.normalize)):
            if given and not self.additive:
                raise InputError(f"{name}=True with score={score!r}; it is for score='additive' or 'concat'")
        if self.window is not None and not isinstance(self.window, LocalP):
            raise TypeError(f"window must be a LocalP, got {type(self.window).__name__}; use LocalP(D)")
        if scale is None:
            return
        if scale != "learned" and (not isinstance(scale, float | int) or isinstance(scale, bool)):
            raise InputError(f"scale={scale!r}; it is None, a float or 'learned'")
        if self.additive:
            raise InputError(
                f"scale={scale!r} with score={score!r}, which v scales; for a learned one beside v use normalize=True"
            )

    def reset_parameters(self) -> None:
        """Draw the parameters anew: uniform within 1 / sqrt(inputs), as nn.Linear does; g and scale are set."""
        q, m, units = self.query_size, self.memory_size, self.attn_size
        both = q + m if self.score == "concat" else 0
        bounds = {"weight_memory": both or m, "weight_query": both or q, "bias": both or q, "v": units,
                  "weight_window": q, "v_window": units}  # fmt: skip
        for name, inputs in bounds.items():
            uniform(getattr(self, name), inputs)
        for name, value in (("g", units**-0.5), ("scale", 1.0)):
            if getattr(self, name) is not None:
                nn.init.constant_(getattr(self, name), value)

    def prepare(self, memory: Memory) -> Keys:
        """Project the memory: the keys that `forward` reads, any number of times.

        What stands behind mask False is not read. Raises InputError or TypeError, naming the field.
        """
        out = need_memory(memory, self.memory_size)
        mask, weight, bias = memory.mask, parameter(self, "weight_memory"), parameter(self, "bias")
        factor = self.factor if self.factor is not None else parameter(self, "scale")
        keys = out
        if weight is not None:
            need_dtype("memory.out", out, weight)
        if mask is not None and (weight is not None or factor is not None):
            keys = torch.where(mask[..., None], keys, 0.0)  # NaN behind the mask would reach the weight's gradient
        if weight is not None:
            keys = linear(keys, weight if factor is None else weight * factor, bias)
        elif factor is not None:
            keys = keys * factor
        return Keys(keys, out, mask)

    def params(self) -> AttentionParams:
        """What the score does with a query, as `functional.attention` and `attention_decoder` take it."""
        v = parameter(self, "v")
        if v is not None and self.normalize:
            v = parameter(self, "g") * v / v.norm()
        window = None if self.window is None else (parameter(self, "weight_window"), parameter(self, "v_window"))
        return AttentionParams(parameter(self, "weight_query"), v, window)

    def forward(self, query: Tensor, keys: Keys, *, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """(context [N, D], weights [N, S] or None) of query [N, Q]; or of [N, T, Q], both with T after N.

        N = B * k: row n reads keys n // k. A row with nothing to attend to gives 0. Raises InputError or TypeError.
        """
        call = self.as_call(query, keys, need_weights=need_weights)
        context, weights = run_attention(call, self.backend)
        if query.dim() == 3:
            return context, weights
        return context[:, 0], None if weights is None else weights[:, 0]

    def as_call(self, query: Tensor, keys: Keys, *, need_weights: bool = False) -> AttentionCall:
        """The call that `forward` makes."""
        many = query if need_tensor("query", query).dim() != 2 else query[:, None]
        window = None if self.window is None else self.window.D
        return AttentionCall(many, keys, self.params(), window, need_weights)

    def config(self) -> dict[str, Any]:
        """The arguments that build it again, as plain data; a part is such data with its `kind`."""
        return described(self, query_bias=self.bias is not None, scale=self._scale)

    @property
    def _scale(self) -> float | str | None:
        return self.factor if self.scale is None else "learned"

    def extra_repr(self) -> str:
        text = f"{self.query_size}, {self.memory_size}"
        text += f", attn_size={self.attn_size}" if self.additive else ""
        options = {"query_bias": self.bias is not None, "normalize": self.normalize, "scale": self._scale,
                   "window": self.window}  # fmt: skip
        text += "".join(f", {name}={value!r}" for name, value in options.items() if value)
        return f"{text}, score={self.score!r}{backend_repr(self)}"


AttentionMaker = Callable[[int, int], Attention]  # of query_size and memory_size


def need_memory(memory: Any, size: int) -> Tensor:
    """The `out` of a memory of `size` features; raise what is wrong with it or its mask."""
    check_memory(memory)
    if memory.out is None:
        raise InputError("memory.out is None; an attention reads it: pass Memory(out) with [B, S, D]")
    if memory.out.shape[2] != size:
        raise InputError(
            f"memory.out has shape {tuple(memory.out.shape)}; expected [B, S, D] with D={size}, the memory_size"
        )
    return memory.out


def check_memory(memory: Any) -> None:
    """Raise InputError or TypeError unless `memory` is a sound Memory, whatever it has of out, mask and state."""
    if not isinstance(memory, Memory):
        raise TypeError(
            f"memory must be a fastseq.Memory, got {type(memory).__name__}; use Memory(out, mask),"
            " or Memory.from_rnn(output, hidden, lengths)"
        )
    rows = None
    if memory.out is not None:
        out = need_tensor("memory.out", memory.out)
        if out.dim() != 3:
            raise InputError(f"memory.out has shape {tuple(out.shape)}, {out.dim()}-D; expected [B, S, D]")
        check_mask("memory.mask", memory.mask, out.shape[0], out.shape[1])
        rows = out.shape[0]
    elif memory.mask is not None:
        raise InputError("memory.mask is given without memory.out; pass both, or neither")
    if memory.state is not None:
        _check_layers(memory.state, memory.dirs, rows)


HIDDEN = "Memory.from_rnn(output, hidden) takes (h_n, c_n) as torch.nn's layers return it"


def _check_layers(state: Any, dirs: Any, rows: int | None) -> None:
    """Raise InputError or TypeError unless `state` is a tuple of (h,) or (h, c), each [B, dirs * H], for each layer."""
    if not isinstance(state, (tuple, list)) or not state:
        raise TypeError(
            f"memory.state must be a tuple, one (h,) or (h, c) a layer, got {type(state).__name__}; {HIDDEN}"
        )
    if dirs is not None and (len(dirs) != len(state) or any(n not in (1, 2) for n in dirs)):
        raise InputError(
            f"memory.dirs={dirs} with {len(state)} layer(s) of memory.state; it is 1 or 2 for each of them"
        )
    for index, layer in enumerate(state):
        name = f"memory.state[{index}]"
        if not isinstance(layer, (tuple, list)) or len(layer) not in (1, 2):
            raise TypeError(f"{name} must be a layer's (h,) or (h, c), got {type(layer).__name__}; {HIDDEN}")
        for leaf in layer:
            if need_tensor(name, leaf).dim() != 2 or (rows is not None and leaf.shape[0] != rows):
                expected = "[B, dirs * H]" if rows is None else f"[B, dirs * H] with B={rows}, that of memory.out"
                raise InputError(f"{name} has a tensor of shape {tuple(leaf.shape)}; expected {expected}; {HIDDEN}")
            rows = leaf.shape[0]


def need_dtype(name: str, t: Tensor, weight: Tensor) -> None:
    """Raise InputError unless `weight` can be multiplied by `t`: of one dtype, or under autocast."""
    if t.dtype != weight.dtype and autocast_dtype(t.device.type) is None:
        raise InputError(
            f"{name} is {t.dtype}, parameters are {weight.dtype}; convert one: .to({weight.dtype}),"
            " or use torch.autocast"
        )


def parameter(module: nn.Module, name: str) -> Any:
    """A parameter as it is now: quickly, and where it is parametrized too."""
    try:
        return module._parameters[name]
    except KeyError:
        return getattr(module, name)


def uniform(weight: Tensor | None, inputs: int) -> None:
    """nn.Linear's initial values for so many inputs."""
    if weight is not None:
        nn.init.uniform_(weight, -(inputs**-0.5), inputs**-0.5)

"""Every wrong call of attention is refused before a backend sees it, with its value, the limit and the remedy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import dispatch
from fastseq.backends.decoder_call import DecoderCall
from fastseq.spec import AttentionParams, DecoderSpec, DecoderState, DropoutMasks, Keys
from tests.decoder_oracle import AttentionCase, Problem, preset
from tests.test_decoder import decode, decoder_call

BAHDANAU = decoder_call(preset("bahdanau"))  # N=6, B=3, T=4, I=7, S=9, A=19, D=13, H=20, R=17
LUONG = decoder_call(preset("luong", "gru", score="dot"))
GNMT = decoder_call(preset("gnmt", num_layers=3))
CHO = decoder_call(preset("cho", "gru"))
CONDITIONAL = decoder_call(preset("conditional_gru", "gru"))
LOCAL = decoder_call(preset("luong", window=2))
SUTSKEVER = decoder_call(preset("sutskever"))
P = Problem.draw(AttentionCase())  # Q=20
QUERY = P.tensors["query"]
KEYS = Keys(P.tensors["keys"], P.tensors["memory"], P.mask)
PARAMS = AttentionParams(P.tensors["w_query"], P.tensors["w_v"])
H, C = BAHDANAU.state.layers[0]
PADDING = torch.zeros(3, 9, dtype=torch.bool)


def y(call: DecoderCall, change: Callable[[Tensor], Tensor]) -> Any:
    return decode(replace(call, y=change(call.y)))


def keys(call: DecoderCall, **changes: Any) -> Any:
    return decode(replace(call, keys=call.keys._replace(**changes)))


def state(call: DecoderCall, **changes: Any) -> Any:
    return decode(replace(call, state=call.state._replace(**changes)))


def params(call: DecoderCall, **changes: Any) -> Any:
    return decode(replace(call, params=call.params._replace(**changes)))


def masks(call: DecoderCall, **changes: Any) -> Any:
    return decode(replace(call, masks=DropoutMasks(**changes)))


def layer(call: DecoderCall, place: int, t: Any) -> Any:
    first = list(call.params.layers[0])
    first[place] = t
    return params(call, layers=(tuple(first), *call.params.layers[1:]))


def attend(query: Any = QUERY, keys: Any = KEYS, params: Any = PARAMS, **options: Any) -> Any:
    return fastseq.functional.attention(query, keys, params, **options)


VALUES: dict[str, tuple[Callable[[], Any], str]] = {  # name: (call, what the message must say)
    "rank of y": (lambda: y(BAHDANAU, lambda y: y[0]), r"y has shape \(4, 7\), 2-D; expected \[N, T, I\]; one step is"),
    "no steps": (lambda: y(BAHDANAU, lambda y: y[:, :0]), r"y has T=0 steps"),
    "token ids": (lambda: y(BAHDANAU, Tensor.long), r"y is torch.int64; .*y.float\(\)"),
    "features of y": (lambda: y(BAHDANAU, lambda y: y[..., 1:]), r"w_ih .*; it reads y 6 \+ context 13"),
    "rows of y": (lambda: y(BAHDANAU, lambda y: y[:5]), r"N, H\] = \(5, 20\)"),
    "dtype of y": (lambda: y(BAHDANAU, Tensor.double), r"keys.keys is torch.float32, y is torch.float64; .*autocast"),
    "device of y": (lambda: y(BAHDANAU, lambda y: y.to("meta")), r"keys.keys is on cpu, y on meta; move one"),
    "rows and keys": (
        lambda: keys(BAHDANAU, keys=torch.zeros(4, 9, 19), memory=torch.zeros(4, 9, 13), mask=None),
        r"y has N=6 rows, the keys have B=4; N must be a multiple of B",
    ),
    "rows without keys": (
        lambda: keys(BAHDANAU, keys=torch.zeros(0, 9, 19), memory=torch.zeros(0, 9, 13), mask=None),
        r"the keys have B=0",
    ),
    "shape of the mask": (
        lambda: keys(BAHDANAU, mask=PADDING.T),
        r"keys.mask has shape \(9, 3\), 2-D; expected \[B, S\] = \(3, 9\); .*pass ~key_padding_mask",
    ),
    "mask of the rows": (lambda: keys(BAHDANAU, mask=torch.ones(6, 9).bool()), r"keys.mask has shape \(6, 9\)"),
    "mask of every step": (lambda: keys(BAHDANAU, mask=torch.ones(3, 4, 9).bool()), r"keys.mask has shape \(3, 4, 9\)"),
    "device of the mask": (lambda: keys(BAHDANAU, mask=PADDING.to("meta")), r"keys.mask is on meta, y on cpu"),
    "keys and memory": (
        lambda: keys(BAHDANAU, memory=torch.zeros(3, 8, 13)),
        r"keys.memory has shape \(3, 8, 13\), 3-D; expected \[B, S, D\] = \(3, 9, any\)",
    ),
    "memory features": (
        lambda: keys(BAHDANAU, memory=torch.zeros(3, 9, 12)),
        r"params.layers\[0\]\[0\] has shape \(80, 20\), 2-D; expected w_ih .* = \(80, 19\); it reads y 7 \+ context 12",
    ),
    "attention units": (lambda: keys(BAHDANAU, keys=torch.zeros(3, 9, 18)), r"A=19, keys.keys have A=18"),
    "query and keys": (
        lambda: keys(LUONG, keys=torch.zeros(3, 9, 19)),
        r"the query has Q=20 features, keys.keys A=19; .*score='general'",
    ),
    "query and W_q": (
        lambda: params(BAHDANAU, attention=BAHDANAU.params.attention._replace(query=torch.zeros(19, 21))),
        r"the query has Q=20 features, W_q \(19, 21\) takes 21",
    ),
    "v": (
        lambda: params(BAHDANAU, attention=BAHDANAU.params.attention._replace(v=torch.zeros(1, 19))),
        r"params.v has shape \(1, 19\), 2-D; expected \[A\] = \(19\)",
    ),
    "no keys": (
        lambda: decode(replace(BAHDANAU, keys=Keys())),
        r"keys.keys and keys.memory are needed .*Decoder.prepare",
    ),
    "context and attention": (
        lambda: keys(BAHDANAU, context=torch.zeros(3, 13)),
        r"keys.context is given with spec.att",
    ),
    "no context": (lambda: decode(replace(CHO, keys=Keys())), r"keys.context=None, but context_to='first'"),
    "keys without attention": (lambda: keys(CHO, keys=torch.zeros(3, 9, 20)), r"given with spec.attention=False"),
    "rank of the context": (lambda: keys(CHO, context=torch.zeros(3, 1, 13)), r"keys.context has shape \(3, 1, 13\)"),
    "rows of the context": (lambda: keys(CHO, context=torch.zeros(4, 13)), r"the keys have B=4"),
    "C": (lambda: params(CHO, context_hidden=torch.zeros(60, 12)), r"context_hidden .*C \[G\*H, D\] = \(60, 13\)"),
    "no C": (
        lambda: params(CHO, context_hidden=None),
        r"context_hidden is None with spec.context_side='hidden'; pass it",
    ),
    "C without need": (lambda: params(BAHDANAU, context_hidden=torch.zeros(80, 13)), r"is given .*'input'; pass None"),
    "no layers": (lambda: params(BAHDANAU, layers=()), r"params.layers has 0 layers, spec.num_layers=1"),
    "layers of the state": (lambda: state(GNMT, layers=GNMT.state.layers[:2]), r"state.layers has 2 layers, .*=3; Dec"),
    "w_hh": (
        lambda: layer(BAHDANAU, 1, torch.zeros(80, 19)),
        r"\(80, 20\), 2-D; expected w_ih \[G\*H, X\] = \(76, 20\)",
    ),
    "b_ih": (
        lambda: layer(BAHDANAU, 2, torch.zeros(20)),
        r"layers\[0\]\[2\] has shape \(20,\), .* b_ih \[G\*H\] = \(80\)",
    ),
    "b_hh": (lambda: layer(BAHDANAU, 3, torch.zeros(80, 1)), r"layers\[0\]\[3\] has shape \(80, 1\), .* b_hh"),
    "dtype of a weight": (
        lambda: layer(BAHDANAU, 1, torch.zeros(80, 20).half()),
        r"layers\[0\]\[1\] is torch.float16, y is",
    ),
    "weights of the second cell": (
        lambda: params(CONDITIONAL, transition=None),
        r"params.transition is None with spec.attend='between'",
    ),
    "input of the second cell": (
        lambda: params(CONDITIONAL, transition=CONDITIONAL.params.layers[0]),
        r"params.transition\[0\] .*it reads context 13",
    ),
    "no attention": (lambda: params(BAHDANAU, attention=None), r"params.attention is None with spec.attention"),
    "attention without need": (lambda: params(SUTSKEVER, attention=PARAMS), r"params.attention is given .*; pass None"),
    "window without D": (
        lambda: decode(replace(LOCAL, spec=replace(LOCAL.spec, window=None))),
        r"window=None with params.window given",
    ),
    "D without window": (
        lambda: decode(replace(BAHDANAU, spec=replace(BAHDANAU.spec, window=3))),
        r"window=3 with params.window None",
    ),
    "W_p": (
        lambda: params(LOCAL, attention=LOCAL.params.attention._replace(window=(torch.zeros(5, 19), torch.zeros(5)))),
        r"params.window\[0\] has shape \(5, 19\), 2-D; expected W_p \[A', Q\] = \(any, 20\)",
    ),
    "v_p": (
        lambda: params(LOCAL, attention=LOCAL.params.attention._replace(window=(torch.zeros(5, 20), torch.zeros(4)))),
        r"params.window\[1\] has shape \(4,\)",
    ),
    "readout features": (
        lambda: params(BAHDANAU, readout=(torch.zeros(34, 39), None)),
        r"readout\[0\] .*\[R, P\] = \(any, 40\); its parts are prev_state 20 \+ input 7 \+ context 13",
    ),
    "odd maxout": (lambda: params(BAHDANAU, readout=(torch.zeros(33, 40), None)), r"33 rows; maxout takes pairs"),
    "readout bias": (
        lambda: params(BAHDANAU, readout=(torch.zeros(34, 40), torch.zeros(17))),
        r"readout\[1\] has .*\(34\)",
    ),
    "no readout": (lambda: params(BAHDANAU, readout=None), r"params.readout is None with spec.combine='maxout'"),
    "readout without need": (
        lambda: params(SUTSKEVER, readout=(torch.zeros(4, 20), None)),
        r"params.readout is given with spec.combine=None",
    ),
    "rows of the state": (
        lambda: state(BAHDANAU, layers=((H[:3], C),)),
        r"h of state.layers\[0\] has shape \(3, 20\), 2-D; expected \[N, H\] = \(6, 20\); Decoder.init_state",
    ),
    "units of the state": (
        lambda: state(BAHDANAU, layers=((H, C[:, 1:]),)),
        r"c of state.layers\[0\] has shape \(6, 19\)",
    ),
    "dtype of the state": (
        lambda: state(BAHDANAU, layers=((H.half(), C),)),
        r"layers\[0\]\[0\] is torch.float16, y is",
    ),
    "two dtypes in the state": (
        lambda: decode(lowered(BAHDANAU, DecoderState(((H, C.bfloat16()),)))),
        r"state.layers\[0\]\[1\] is torch.bfloat16, state.layers\[0\]\[0\] is torch.float32; a state has one",
    ),
    "no feed": (lambda: state(LUONG, feed=None), r"state.feed is None with spec.feed='output'"),
    "feed without need": (lambda: state(BAHDANAU, feed=torch.zeros(6, 17)), r"state.feed is given with spec.feed=None"),
    "features of the feed": (lambda: state(LUONG, feed=torch.zeros(6, 16)), r"state.feed .*\[N, F\] = \(6, 17\)"),
    "features of a fed context": (lambda: state(GNMT, feed=torch.zeros(6, 17)), r"state.feed .*\[N, F\] = \(6, 13\)"),
    "mask of the input": (lambda: masks(BAHDANAU, input=torch.ones(6, 4, 1)), r"dropout_masks.input .*= \(6, 4, 7\)"),
    "masks of the layers": (
        lambda: masks(GNMT, layers=torch.ones(3, 6, 4, 20)),
        r"dropout_masks.layers .*\(2, 6, 4, 20\)",
    ),
    "mask of the readout": (
        lambda: masks(BAHDANAU, readout=torch.ones(6, 40)),
        r"dropout_masks.readout .*\(6, 4, 40\)",
    ),
    "mask of the output": (
        lambda: masks(BAHDANAU, output=torch.ones(6, 4, 34)),
        r"dropout_masks.output .*\(6, 4, 17\)",
    ),
    "boolean dropout mask": (
        lambda: masks(BAHDANAU, output=torch.ones(6, 4, 17).bool()),
        r"output is torch.bool, y is",
    ),
    "unknown backend": (lambda: decode(BAHDANAU, "gpu"), r"unknown backend='gpu'"),
    "torch": (lambda: decode(BAHDANAU, "torch"), r"torch has no attention decoder; use 'auto' or one of \["),
    "attention by torch": (lambda: attend(backend="torch"), r"torch has no attention of several queries; use 'auto'"),
    "rank of the query": (lambda: attend(QUERY[None]), r"query has shape \(1, 6, 4, 20\), 4-D; expected \[N, T, Q\]"),
    "no queries": (lambda: attend(QUERY[:, :0]), r"query has T=0"),
    "features of the query": (lambda: attend(QUERY[..., 1:]), r"the query has Q=19 features, W_q \(19, 20\) takes 20"),
    "rows of the query": (lambda: attend(QUERY[:4]), r"query has N=4 rows, the keys have B=3"),
    "dtype of the query": (lambda: attend(QUERY.bfloat16()), r"keys.keys is torch.float32, query is torch.bfloat16"),
    "keys of an attention": (
        lambda: attend(keys=KEYS._replace(keys=KEYS.keys[0])),
        r"keys.keys has shape \(9, 19\), 2-D",
    ),
    "mask of an attention": (lambda: attend(keys=KEYS._replace(mask=PADDING.T)), r"pass ~key_padding_mask"),
    "window of an attention": (lambda: attend(window=2), r"window=2 with params.window None"),
    "no width": (
        lambda: attend(params=PARAMS._replace(window=(torch.zeros(2, 20), torch.zeros(2))), window=0),
        r"window=0; it is D",
    ),
    "width is no int": (
        lambda: attend(params=PARAMS._replace(window=(torch.zeros(2, 20), torch.zeros(2))), window=True),
        r"window=True",
    ),
    "length to reverse": (lambda: fastseq.functional.reverse(QUERY, [4, 4, 4, 4, 4, 5]), r"lengths\[5\]=5 is outside"),
    "rank to reverse": (lambda: fastseq.functional.reverse(QUERY[0, 0], [1]), r"x has shape \(20,\), 1-D"),
}
TYPES: dict[str, tuple[Callable[[], Any], str]] = {
    "float mask": (
        lambda: keys(BAHDANAU, mask=torch.ones(3, 9)),
        r"keys.mask is torch.float32, expected torch.bool with True = attend; pass ~key_padding_mask, or mask.bool\(\)",
    ),
    "fp16 mask of an attention": (lambda: attend(keys=KEYS._replace(mask=torch.ones(3, 9).half())), r"float16, .*~key"),
    "integer mask": (
        lambda: keys(BAHDANAU, mask=torch.ones(3, 9).long()),
        r"keys.mask is torch.int64, .*~key_padding_mask",
    ),
    "list for a mask": (lambda: keys(BAHDANAU, mask=[[True] * 9] * 3), r"keys.mask must be a torch.Tensor, got list"),
    "list for y": (lambda: decode(replace(BAHDANAU, y=[[1.0]])), r"y must be a torch.Tensor, got list"),
    "memory for keys": (
        lambda: decode(replace(BAHDANAU, keys=KEYS.memory)),
        r"keys must be of type Keys, got Tensor; pass what",
    ),
    "tuple for keys": (
        lambda: decode(replace(BAHDANAU, keys=tuple(BAHDANAU.keys))),
        r"keys must be of type Keys, got tuple",
    ),
    "tuple for the state": (
        lambda: decode(replace(BAHDANAU, state=((H, C),))),
        r"state must be of type DecoderState, got tuple",
    ),
    "tuple for the parameters": (lambda: decode(replace(BAHDANAU, params=())), r"params must be of type DecoderParams"),
    "dictionary for the spec": (
        lambda: decode(replace(BAHDANAU, spec={"cell": "lstm"})),
        r"spec must be of type DecoderSpec, got dict",
    ),
    "tensor for masks": (lambda: decode(replace(BAHDANAU, masks=H)), r"masks must be of type DropoutMasks, got Tensor"),
    "list of layers": (
        lambda: params(BAHDANAU, layers=[*BAHDANAU.params.layers]),
        r"params.layers .* got list; .* a tuple",
    ),
    "a cell's number of weights": (
        lambda: params(BAHDANAU, layers=(BAHDANAU.params.layers[0][:2],)),
        r"\(w_ih, w_hh, b_ih",
    ),
    "half an LSTM's state": (
        lambda: state(BAHDANAU, layers=((H,),)),
        r"must be a tuple \(h, c,\), got tuple of length 1",
    ),
    "an LSTM's state for a GRU": (
        lambda: state(LUONG, layers=((H, C),)),
        r"must be a tuple \(h,\), got tuple of length 2",
    ),
    "a tensor for a state": (lambda: state(LUONG, layers=(H,)), r"must be a tuple \(h,\), got Tensor"),
    "list for a query": (lambda: attend([[0.0]]), r"query must be a torch.Tensor, got list"),
    "tuple for attention's parameters": (
        lambda: attend(params=tuple(PARAMS)),
        r"params must be of type AttentionParams, got tuple",
    ),
    "a weight for the readout": (
        lambda: params(BAHDANAU, readout=(torch.zeros(34, 40),)),
        r"readout must be a pair \(w, b",
    ),
    "float lengths": (lambda: fastseq.functional.reverse(QUERY, torch.ones(6)), r"lengths must hold integers"),
}
SPECS: dict[str, dict[str, Any]] = {  # what the message must say: the spec
    "cell='rnn'; use one of 'lstm', 'gru', 'gru_reset_before'": {"cell": "rnn"},
    "attend='during'; use one of": {"attend": "during"},
    "readout='states'; use one of": {"readout": ("states",)},
    "readout is empty": {"readout": ()},
    "num_layers=0": {"num_layers": 0},
    "query_layer=2 of 2 layer.*use 0 to": {"num_layers": 2, "query_layer": 2},
    "query_layer=-3 of 2": {"num_layers": 2, "query_layer": -3},
    "context_to='first' with attend='after'.*use feed='context'": {"attend": "after", "context_to": "first"},
    "query_layer=1, the last.*use query_layer=0": {"attend": "after", "context_to": "upper", "num_layers": 2},
    "context_to='upper' with num_layers=1; use 'first'": {"context_to": "upper"},
    "attend='between' with num_layers=2": {"attend": "between", "num_layers": 2},
    "attend='between'.* attention=False": {"attend": "between", "attention": False},
    "attend='between', whose second cell reads": {"attend": "between", "context_to": "first"},
    "query='feed' needs attend='before' and feed": {"query": "feed"},
    "query='feed' needs": {"query": "feed", "feed": "output", "attend": "after"},
    "context_side='hidden' with attention": {"context_side": "hidden", "context_to": "first"},
    "context_side='hidden' with context_to='none'": {"context_side": "hidden", "attention": False},
    "use cell='gru', which is Cho's": {
        "context_side": "hidden",
        "context_to": "first",
        "attention": False,
        "cell": "gru_reset_before",
    },
    "feed='context' without attention": {"feed": "context", "attention": False},
    "drop it from readout or use combine='linear'": {"feed": "output", "readout": ("state", "input")},
    "residual=2 of 2 layer": {"num_layers": 2, "residual": 2},
    "residual=0 of 2": {"num_layers": 2, "residual": 0},
    "residual=1 with 'prev_state'": {"num_layers": 2, "residual": 1, "readout": ("prev_state",)},
    "window=0; it is D >= 1": {"window": 0},
    "window=2.*with attention": {"window": 2, "attention": False},
}


def lowered(call: DecoderCall, state: DecoderState) -> DecoderCall:
    """The call in bf16 but for the state."""

    def low(tree: Any) -> Any:
        if isinstance(tree, tuple):
            return type(tree)(*map(low, tree)) if hasattr(tree, "_fields") else tuple(map(low, tree))
        return tree if tree is None or not tree.is_floating_point() else tree.bfloat16()

    return replace(
        call, y=low(call.y), keys=low(call.keys), params=low(call.params), masks=low(call.masks), state=state
    )


@pytest.mark.parametrize("name", VALUES)
def test_wrong_values(name: str) -> None:
    call, message = VALUES[name]
    with pytest.raises(fastseq.InputError, match=message):
        call()


@pytest.mark.parametrize("name", TYPES)
def test_wrong_types(name: str) -> None:
    call, message = TYPES[name]
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("message", SPECS)
def test_refused_combinations(message: str) -> None:
    with pytest.raises(fastseq.InputError, match=message):
        DecoderSpec(**SPECS[message])


def test_no_backend_sees_a_wrong_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a plan kept from a good call of nearly that kind let it through."""
    for call in (BAHDANAU, LUONG, GNMT, CHO, CONDITIONAL, LOCAL, SUTSKEVER):
        decode(call)
    attend()

    def never(call: Any) -> None:
        raise AssertionError("a backend was asked")

    for operator in ("decoder", "attention"):
        for name in dispatch.OPERATORS[operator].modules:
            monkeypatch.setattr(dispatch.load(name, operator), operator, never)
    for wrong, _ in (*VALUES.values(), *TYPES.values()):
        with pytest.raises((fastseq.InputError, TypeError)):
            wrong()

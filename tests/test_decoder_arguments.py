"""Every wrong argument of fastseq.Decoder is refused, at construction where that is known, with value and remedy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastseq import Attention, Bridge, Decoder, InputError, Memory

B, T, S, I, H, D = 2, 3, 4, 5, 6, 6  # noqa: E741
STATE = ((torch.zeros(B, H), torch.zeros(B, H)),)
OUT, Y, MASK = torch.zeros(B, S, D), torch.zeros(B, T, I), torch.ones(B, S, dtype=torch.bool)
MEMORY = Memory(OUT, MASK, STATE)
LUONG = Decoder.luong(I, H, memory_size=D)
CHO = Decoder.cho(I, H, memory_size=D)
KEYS, FIRST = LUONG.prepare(MEMORY), LUONG.init_state(MEMORY)


def with_bridge(made: Any) -> Any:
    """A call of a decoder whose bridge makes this."""
    return Decoder.luong(I, H, memory_size=D, bridge=lambda memory: made)(Y, MEMORY)


CONSTRUCTION: dict[str, tuple[Callable[[], Any], str]] = {
    "sizes": (lambda: Decoder(0, H, readout=("state",)), r"input_size=0; it is at least 1"),
    "hidden": (lambda: Decoder(I, -1, readout=("state",)), r"hidden_size=-1; it is at least 1"),
    "memory_size": (lambda: Decoder.luong(I, H), r"memory_size=None, but attention reads it; pass memory_size"),
    "context of the readout": (lambda: Decoder(I, H), r"memory_size=None, but .*readout=\('context', 'state'\)"),
    "no memory": (lambda: Decoder.luong(I, H, memory_size=0), r"memory_size=0; it is at least 1"),
    "two memory sizes": (
        lambda: Decoder.luong(I, H, attention=Attention(H, D), memory_size=5),
        r"memory_size=5, but the attention reads 6 features; leave it out",
    ),
    "query size": (
        lambda: Decoder.luong(I, H, attention=Attention(4, D)),
        r"attention takes queries of 4 features and a memory of 6; this decoder has 6 and 6",
    ),
    "query of what is fed": (
        lambda: Decoder(I, H, attention=Attention(H, 4), query="feed", feed="context"),
        r"queries of 6 features and a memory of 4; this decoder has 4 and 4",
    ),
    "score": (lambda: Decoder.luong(I, H, memory_size=D, attention="mlp"), r"score='mlp'; use one of 'additive'"),
    "dot of two sizes": (lambda: Decoder.luong(I, H, memory_size=4, attention="dot"), r"score='dot' with query_size=6"),
    "OpenNMT's scores": (
        lambda: Decoder.opennmt(I, H, memory_size=D, attention="mlp"),
        r"attention='mlp'; use one of 'general', 'dot', 'additive'",
    ),
    "cell": (lambda: Decoder.luong(I, H, memory_size=D, cell="rnn"), r"cell='rnn'; use one of 'lstm'"),
    "readout": (lambda: Decoder(I, H, readout=("states",)), r"readout='states'; use one of 'state'"),
    "combine": (lambda: Decoder(I, H, readout=("state",), combine="max"), r"combine='max'; use one of None, 'tanh'"),
    "attention for nothing, fed": (
        lambda: Decoder.luong(I, H, memory_size=D, readout=("state", "input")),
        r"nothing reads its context: .*feed='output', .*leave attention out",
    ),
    "attention for nothing": (
        lambda: Decoder.sutskever(I, H, memory_size=D, attention="additive"),
        r"attention, but nothing reads its context: .*readout=\('state',\); put 'context' into readout",
    ),
    "size of no map": (
        lambda: Decoder.sutskever(I, H, combine_size=4),
        r"combine_size=4, combine_bias=False with combine=None.*use combine='linear'",
    ),
    "bias of no map": (lambda: Decoder.sutskever(I, H, combine_bias=True), r"combine_bias=True with combine=None"),
    "no combine_size": (lambda: Decoder.luong(I, H, memory_size=D, combine_size=0), r"combine_size=0; it is at least"),
    "context too late": (
        lambda: Decoder.luong(I, H, memory_size=D, context_to="first"),
        r"context_to='first' with attend='after'.*use feed='context'",
    ),
    "Cho's reset": (
        lambda: Decoder.cho(I, H, memory_size=D, cell="gru_reset_before"),
        r"context_side='hidden' with cell='gru_reset_before'.*use cell='gru', which is Cho's decoder",
    ),
    "layers between": (lambda: Decoder.conditional_gru(I, H, 2, memory_size=D), r"attend='between' with num_layers=2"),
    "layers of GNMT": (lambda: Decoder.gnmt(I, H, 1, memory_size=D), r"num_layers=1; GNMT's upper layers"),
    "residual": (lambda: Decoder.luong(I, H, 2, memory_size=D, residual=2), r"residual=2 of 2 layer\(s\)"),
    "summary": (lambda: Decoder.luong(I, H, memory_size=D, summary_size=4), r"summary_size=4 with attention; .*None"),
    "summary of nothing": (lambda: Decoder.sutskever(I, H, summary_size=4), r"memory_size=None, but"),
    "dropout": (lambda: Decoder.luong(I, H, memory_size=D, input_dropout=1.1), r"input_dropout=1.1; it is a prob"),
    "bridge": (
        lambda: Decoder.luong(I, H, 2, memory_size=D, bridge=Bridge(layers=(0,))),
        r"layers=\(0,\) of a Bridge to 2 layer\(s\); name one",
    ),
    "backend": (lambda: Decoder.luong(I, H, memory_size=D, backend="gpu"), r"unknown backend='gpu'"),
}  # fmt: skip
CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "features of y": (lambda: LUONG(Y[..., :4], MEMORY), r"y has shape \(2, 3, 4\); expected .* I=5, input_size"),
    "rank of y": (lambda: LUONG(Y[:, 0], MEMORY), r"y has shape \(2, 5\), 2-D; expected \[N, T, I\]; one step is"),
    "rank of a step": (lambda: LUONG.step(Y, KEYS, FIRST), r"y of a step has shape \(2, 3, 5\), 3-D; .* \[N, I\]"),
    "no steps": (lambda: LUONG(Y[:, :0], MEMORY), r"T=0 steps; at least one"),
    "dtype of y": (lambda: LUONG(Y.double(), MEMORY), r"torch.float32, y is torch.float64; .*torch.autocast"),
    "rows of y": (lambda: LUONG(Y[:1], MEMORY), r"y has N=1 rows, the memory B=2; N must be a multiple"),
    "rows of a state": (lambda: LUONG.step(Y[:1, 0], KEYS, FIRST), r"state.layers\[0\] has shape \(2, 6\)"),
    "memory's features": (lambda: LUONG(Y, Memory(OUT[..., :4], None, STATE)), r"shape \(2, 4, 4\); expected .* D=6"),
    "no out": (lambda: LUONG(Y, Memory(state=STATE)), r"memory.out is None; an attention reads it"),
    "mask alone": (lambda: LUONG(Y, Memory(mask=MASK, state=STATE)), r"memory.mask is given without memory.out"),
    "mask's shape": (lambda: LUONG(Y, Memory(OUT, MASK.T, STATE)), r"memory.mask has shape .*~key_padding_mask"),
    "no state": (lambda: LUONG(Y, Memory(OUT)), r"memory.state is None, but Bridge\(source='last'"),
    "keys without a state": (lambda: LUONG(Y, KEYS), r"keys without a state; pass init_state\(memory\)"),
    "state of another": (lambda: LUONG(Y, MEMORY, FIRST._replace(feed=None)), r"state.feed is None with spec"),
    "nothing to read": (lambda: CHO(Y, Memory()), r"memory has neither state nor out"),
    "context's features": (
        lambda: CHO(Y, Memory(state=((torch.zeros(B, 4),),))),
        r"memory.state\[-1\]\[0\] gives a context of 4 features; expected 6, the memory_size",
    ),
    "layers of a function": (lambda: with_bridge(STATE * 2), r"bridge gave tuple of length 2; expected .* 1 layer"),
    "leaves of a function": (lambda: with_bridge(((STATE[0][0],),)), r"bridge gave tuple of length 1 for layer 0"),
    "sizes of a function": (lambda: with_bridge(((OUT[:, 0, :4],) * 2,)), r"bridge gave \(2, 4\) for layer 0; .*H=6"),
}  # fmt: skip
TYPES: dict[str, tuple[Callable[[], Any], str]] = {
    "memory": (lambda: LUONG(Y, OUT), r"memory must be a fastseq.Memory, got Tensor; .*Memory.from_rnn"),
    "memory to prepare": (lambda: LUONG.prepare(OUT), r"memory must be a fastseq.Memory"),
    "memory to start": (lambda: LUONG.init_state((OUT, None, None)), r"memory must be a fastseq.Memory, got tuple"),
    "memory to explain": (lambda: LUONG.as_call(Y, None), r"memory must be a fastseq.Memory, got NoneType"),
    "y": (lambda: LUONG([0.0], MEMORY), r"y must be a torch.Tensor, got list"),
    "memory of a step": (lambda: LUONG.step(Y[:, 0], MEMORY, FIRST), r"keys must be a fastseq.Keys, got Memory"),
    "keys of a step": (lambda: LUONG.step(Y[:, 0], None, FIRST), r"keys must be a fastseq.Keys, got NoneType; "),
    "state": (lambda: LUONG(Y, MEMORY, STATE), r"state must be of type DecoderState, got tuple; Decoder.init_state"),
    "float mask": (lambda: LUONG(Y, Memory(OUT, MASK.float(), STATE)), r"expected torch.bool.*~key_padding_mask"),
    "attention": (lambda: Decoder.luong(I, H, memory_size=D, attention=3), r"attention must be an Attention, .* int"),
    "attention's maker": (lambda: Decoder.luong(I, H, memory_size=D, attention=lambda q, m: q), r"got int"),
    "backend": (lambda: Decoder.luong(I, H, memory_size=D, backend=None), r"backend must be a str"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_refused_at_construction(name: str) -> None:
    make, message = CONSTRUCTION[name]
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("name", CALLS)
def test_refused_calls(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("name", TYPES)
def test_wrong_types(name: str) -> None:
    call, message = TYPES[name]
    with pytest.raises(TypeError, match=message):
        call()


def test_dropout_between_layers_of_one_warns() -> None:
    with pytest.warns(UserWarning, match=r"dropout=0.5 is between layers, of which there is one; use input_dropout"):
        Decoder.luong(I, H, memory_size=D, dropout=0.5)


def test_a_bridge_that_does_not_fit_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def worked(*args: object) -> None:
        raise AssertionError("the memory was projected")

    decoder = Decoder.luong(I, H, 2, memory_size=D)
    monkeypatch.setattr(Attention, "prepare", worked)
    with pytest.raises(InputError, match=r"memory.state has 1 layer\(s\), the decoder 2"):
        decoder(Y, MEMORY)

"""What the weights of toolkits' and papers' decoders are in fastseq: one function for each, by the names they save.

All that differs stands here: order of gates and of concatenated parts, transposed kernels, biases kept apart, which
side a score projects, and what a decoder starts from. Every function is differentiable, so that gradients by a
toolkit's weights can be compared, and takes the decoder's names without their common prefix.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastseq.spec import AttentionParams, CellParams, DecoderParams, DecoderSpec, DecoderState, Keys, LayerState, Memory

__all__ = ["Converted", "Score", "bahdanau", "bentrevett", "cho", "fairseq", "gnmt", "joeynmt", "luong_local",
           "nematus", "opennmt", "sutskever", "tensorflow_nmt"]  # fmt: skip

Weights = Mapping[str, Tensor]
Start = Callable[[Memory], tuple[LayerState, ...]]
KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Score(NamedTuple):
    """The parameters of an attention, as its module has them."""

    key: Tensor | None = None  # [A, D]; None: the memory as it is
    query: Tensor | None = None  # [A, H]; None: the state as it is
    query_bias: Tensor | None = None  # [A]
    v: Tensor | None = None  # [A]: additive
    norm: Tensor | None = None  # g of g v / |v|
    scale: Tensor | None = None  # of a dot or general score
    window: tuple[Tensor, Tensor] | None = None  # W_p, v_p

    def keys(self, memory: Memory) -> Keys:
        """Projection, query bias and scale belong to the keys."""
        keys = memory.out if self.key is None else linear(memory.out, self.key, self.query_bias)
        return Keys(keys if self.scale is None else keys * self.scale, memory.out, memory.mask)

    def params(self) -> AttentionParams:
        v = self.v
        if v is not None and self.norm is not None:
            v = self.norm * v / v.norm()
        return AttentionParams(self.query, v, self.window)

    def named(self) -> dict[str, Tensor | None]:
        w_p, v_p = self.window or (None, None)
        own = {"weight_memory": self.key, "weight_query": self.query, "bias": self.query_bias, "v": self.v,
               "g": self.norm, "scale": self.scale, "weight_window": w_p, "v_window": v_p}  # fmt: skip
        return {f"attention.{name}": t for name, t in own.items()}


def as_they_come(memory: Memory) -> tuple[LayerState, ...]:
    """Every layer from the encoder's state of that layer."""
    return memory.state


class Converted(NamedTuple):
    """A decoder in fastseq's terms."""

    spec: DecoderSpec
    layers: tuple[CellParams, ...]
    start: Start = as_they_come
    score: Score | None = None
    readout: tuple[Tensor, Tensor | None] | None = None
    transition: CellParams | None = None
    context_hidden: Tensor | None = None
    context: Callable[[Memory], Tensor] | None = None  # the fixed one, without attention
    bridge: Weights = MappingProxyType(
        {}
    )  # the parameters of `start` and `context`, by their names in `fastseq.Decoder`

    def keys(self, memory: Memory) -> Keys:
        if self.score is not None:
            return self.score.keys(memory)
        return Keys(context=None if self.context is None else self.context(memory))

    def params(self) -> DecoderParams:
        attention = None if self.score is None else self.score.params()
        return DecoderParams(self.layers, self.transition, self.context_hidden, attention, self.readout)

    def named(self) -> dict[str, Tensor]:
        """The parameters of a `fastseq.Decoder`, by their names there."""
        cells = {f"l{index}": layer for index, layer in enumerate(self.layers)}
        if self.transition is not None:
            cells["transition"] = self.transition
        found = {f"{kind}_{suffix}": t for suffix, cell in cells.items() for kind, t in zip(KINDS, cell, strict=True)}
        found["weight_ch_l0"] = self.context_hidden
        found |= zip(("readout.weight", "readout.bias"), self.readout or (None, None), strict=True)
        found |= {} if self.score is None else self.score.named()
        return {name: t for name, t in found.items() if t is not None} | dict(self.bridge)

    def state(self, memory: Memory) -> DecoderState:
        """What is fed back starts at 0."""
        layers, feed = self.start(memory), None
        if self.spec.feed is not None:
            h = layers[0][0]
            size = memory.out.shape[2] if self.spec.feed == "context" else len(self.readout[0])
            feed = h.new_zeros(len(h), size)
        return DecoderState(layers, feed)


def torch_cells(weights: Weights, form: str) -> tuple[CellParams, ...]:
    """Layers of torch's parameters, whose gates and order are fastseq's; `form` takes the kind and the layer."""
    layers: list[CellParams] = []
    while form.format(KINDS[0], len(layers)) in weights:
        layers.append(tuple(weights[form.format(kind, len(layers))] for kind in KINDS))
    return tuple(layers)


def cell_of(layer: CellParams) -> str:
    """By the number of gates, of torch's cells."""
    return "lstm" if layer[1].shape[0] == 4 * layer[1].shape[1] else "gru"


def opennmt(weights: Weights) -> Converted:
    """OpenNMT-py, under "decoder.": the readout's parts are (context, state); its bias and no tanh with "mlp" alone.

    general: (W_in s) . h is s . (W_in^T h), the key projected. A "std" decoder, without input feeding, has a plain rnn.
    """
    feed = "rnn.layers.0.weight_ih" in weights
    layers = torch_cells(weights, "rnn.layers.{1}.{0}" if feed else "rnn.{0}_l{1}")
    if "attn.v.weight" in weights:
        score = Score(weights["attn.linear_context.weight"], weights["attn.linear_query.weight"],
                      weights["attn.linear_query.bias"], weights["attn.v.weight"][0])  # fmt: skip
    else:
        score = Score(weights["attn.linear_in.weight"].T if "attn.linear_in.weight" in weights else None)
    readout = weights["attn.linear_out.weight"], weights.get("attn.linear_out.bias")
    spec = DecoderSpec(cell_of(layers[0]), len(layers), attend="after", feed="output" if feed else None,
                       combine="tanh" if score.v is None else "linear")  # fmt: skip
    bridge = opennmt_bridge(weights, len(layers) * layers[0][1].shape[1])

    def start(memory: Memory) -> tuple[LayerState, ...]:
        if not bridge:
            return memory.state
        leaves = [torch.cat(leaf, 1) for leaf in zip(*memory.state, strict=True)]  # [B, L * H]
        made = [linear(leaf, bridge[f"bridge.{letter}.0.weight"], bridge[f"bridge.{letter}.0.bias"]).relu()
                for letter, leaf in zip("hc", leaves, strict=False)]  # fmt: skip
        return tuple(zip(*(leaf.chunk(len(layers), 1) for leaf in made), strict=True))

    return Converted(spec, layers, start, score, readout, bridge=bridge)


def opennmt_bridge(weights: Weights, size: int) -> Weights:
    """The encoder's "bridge.0" (h) and "bridge.1" (c) as joint maps over all layers' `size` features.

    A bidirectional encoder's is made for half of them and applied to either half: the same block twice.
    """
    joint = {}
    for index, letter in enumerate("hc"):
        if f"bridge.{index}.weight" in weights:
            weight, bias = weights[f"bridge.{index}.weight"], weights[f"bridge.{index}.bias"]
            blocks = size // len(bias)
            joint[f"bridge.{letter}.0.weight"] = torch.block_diag(*[weight] * blocks)
            joint[f"bridge.{letter}.0.bias"] = bias.repeat(blocks)
    return joint


def fairseq(weights: Weights) -> Converted:
    """fairseq's lstm, under "decoder.": general score of the query's projection, readout of (context, state)."""
    layers = torch_cells(weights, "layers.{1}.{0}")
    sides = {"h": "encoder_hidden_proj", "c": "encoder_cell_proj"}
    bridge = {f"bridge.{letter}.0.{kind}": weights[f"{name}.{kind}"] for letter, name in sides.items()
              for kind in ("weight", "bias") if f"{name}.{kind}" in weights}  # fmt: skip

    def start(memory: Memory) -> tuple[LayerState, ...]:
        """h and c of every layer through one projection each, where the encoder has another size."""
        if not bridge:
            return memory.state
        maps = [(bridge[f"bridge.{letter}.0.weight"], bridge[f"bridge.{letter}.0.bias"]) for letter in "hc"]
        return tuple(tuple(linear(leaf, *m) for leaf, m in zip(layer, maps, strict=True)) for layer in memory.state)

    spec = DecoderSpec("lstm", len(layers), attend="after", feed="output", combine="tanh")
    score = Score(weights["attention.input_proj.weight"].T)
    return Converted(spec, layers, start, score, (weights["attention.output_proj.weight"], None), bridge=bridge)


def joeynmt(weights: Weights, input_feeding: bool = True, init_hidden: str = "bridge") -> Converted:
    """JoeyNMT, under "decoder.": readout of (state, context) with bias; "luong" projects the key.

    All layers start from the encoder's top layer, an LSTM's c as its h: "bridge" from both directions through one tanh
    layer, "last" from the state itself or, of a bidirectional encoder, its forward half.
    """
    layers = torch_cells(weights, "rnn.{0}_l{1}")
    cell, hidden = cell_of(layers[0]), layers[0][1].shape[1]

    bridge = one_map(weights, "bridge_layer") if init_hidden == "bridge" else {}

    def start(memory: Memory) -> tuple[LayerState, ...]:
        h = memory.state[-1][0]
        if init_hidden == "bridge":
            h = linear(h, bridge["bridge.h.0.weight"], bridge["bridge.h.0.bias"]).tanh()
        elif init_hidden == "zero":
            h = h.new_zeros(len(h), hidden)
        layer = (h[:, :hidden],) * (2 if cell == "lstm" else 1)
        return (layer,) * len(layers)

    query, v = weights.get("attention.query_layer.weight"), weights.get("attention.energy_layer.weight")
    score = Score(weights["attention.key_layer.weight"], query, v=None if v is None else v[0])
    spec = DecoderSpec(cell, len(layers), attend="after", feed="output" if input_feeding else None,
                       readout=("state", "context"), combine="tanh")  # fmt: skip
    readout = weights["att_vector_layer.weight"], weights["att_vector_layer.bias"]
    return Converted(spec, layers, start, score, readout, bridge=bridge)


def one_map(weights: Weights, name: str) -> Weights:
    """A Linear of this name as the only map of a bridge."""
    return {f"bridge.h.0.{kind}": weights[f"{name}.{kind}"] for kind in ("weight", "bias")}


def tensorflow_cells(weights: Weights, hidden: int) -> tuple[str, tuple[CellParams, ...]]:
    """(cell, layers) of TensorFlow's variables: one kernel [X + H, G H] of the input above the state.

    BasicLSTMCell: gates i, j, f, o with j torch's g, and 1 is added to f. GRUCell: gates r, u in one variable, the
    candidate in another; u is torch's z; it resets before the product.
    """
    lstm, layers = "cell_0/basic_lstm_cell/kernel" in weights, []
    while any(name.startswith(f"cell_{len(layers)}/") for name in weights):
        name = f"cell_{len(layers)}"
        if lstm:
            kernel, bias = (weights[f"{name}/basic_lstm_cell/{part}"] for part in ("kernel", "bias"))
            i, j, f, o = kernel.chunk(4, 1)
            b_i, b_j, b_f, b_o = bias.chunk(4)
            kernel, bias = torch.cat((i, f, j, o), 1), torch.cat((b_i, b_f + 1, b_j, b_o))
        else:
            kernel, bias = (
                torch.cat([weights[f"{name}/gru_cell/{part}/{what}"] for part in ("gates", "candidate")], -1)
                for what in ("kernel", "bias")
            )
        layers.append((kernel[:-hidden].T, kernel[-hidden:].T, bias, torch.zeros_like(bias)))
    return "lstm" if lstm else "gru_reset_before", tuple(layers)


def tensorflow_score(weights: Weights) -> Score:
    """LuongAttention with or without its learned scale; BahdanauAttention, normed where it has a g."""
    key, g = weights["memory_layer/kernel"].T, weights.get("attention_g")
    if "query_layer/kernel" not in weights:
        return Score(key, scale=g)
    return Score(key, weights["query_layer/kernel"].T, weights.get("attention_b"), weights["attention_v"], g)


def tensorflow_nmt(weights: Weights) -> Converted:
    """tensorflow/nmt's attention model: readout of (state, context), neither bias nor tanh."""
    output = weights["attention_layer/kernel"]
    cell, layers = tensorflow_cells(weights, output.shape[1])
    spec = DecoderSpec(cell, len(layers), attend="after", feed="output", readout=("state", "context"), combine="linear")
    return Converted(spec, layers, score=tensorflow_score(weights), readout=(output.T, None))


def gnmt(weights: Weights) -> Converted:
    """tensorflow/nmt's gnmt_v2: the first layer, which asks, starts from the backward half of the bidirectional one."""
    cell, layers = tensorflow_cells(weights, weights["memory_layer/kernel"].shape[1])

    def start(memory: Memory) -> tuple[LayerState, ...]:
        bottom, *upper = memory.state
        return tuple(leaf.chunk(2, 1)[1] for leaf in bottom), *upper

    spec = DecoderSpec(cell, len(layers), attend="after", query_layer=0, feed="context", context_to="upper",
                       readout=("state",), residual=2 if len(layers) > 2 else None)  # fmt: skip
    return Converted(spec, layers, start, tensorflow_score(weights))


def bentrevett(weights: Weights) -> Converted:
    """The biased energy over [s; h] is a query's and a key's projection; the readout is (state, context, input)."""
    layers, energy = torch_cells(weights, "rnn.{0}_l{1}"), weights["attn.weight"]
    hidden = layers[0][1].shape[1]

    def start(memory: Memory) -> tuple[LayerState, ...]:
        return ((linear(memory.state[-1][0], weights["encoder_fc.weight"], weights["encoder_fc.bias"]).tanh(),),)

    score = Score(energy[:, hidden:], energy[:, :hidden], weights["attn.bias"], weights["v.weight"][0])
    spec = DecoderSpec("gru", context_to="first", readout=("state", "context", "input"))
    return Converted(spec, layers, start, score, bridge=one_map(weights, "encoder_fc"))


def nematus(weights: Weights) -> Converted:
    """Kernels [in, out], gates r and u apart from the candidate; u is torch's z. One bias a gate: the other is 0.

    The first cell adds it outside the reset's bracket, the second ("nl") inside. c_tt shifts every score alike.
    """

    def pair(gates: str, candidate: str) -> Tensor:
        return torch.cat((weights[gates], weights[candidate]), -1).T

    b, b_nl = torch.cat((weights["b"], weights["bx"])), torch.cat((weights["b_nl"], weights["bx_nl"]))
    first = pair("W", "Wx"), pair("U", "Ux"), b, torch.zeros_like(b)
    second = pair("Wc", "Wcx"), pair("U_nl", "Ux_nl"), torch.zeros_like(b_nl), b_nl
    parts = ("prev", "lstm", "ctx")
    readout = torch.cat([weights[f"ff_logit_{part}_W"] for part in parts]).T
    bias = torch.stack([weights[f"ff_logit_{part}_b"] for part in parts]).sum(0)

    def start(memory: Memory) -> tuple[LayerState, ...]:
        if memory.mask is None:
            mean = memory.out.mean(1)
        else:
            mask = memory.mask[:, :, None]
            mean = (memory.out * mask).sum(1) / mask.sum(1)
        return ((torch.tanh(mean @ weights["ff_state_W"] + weights["ff_state_b"]),),)

    score = Score(weights["Wc_att"].T, weights["W_comb_att"].T, weights["b_att"], weights["U_att"][:, 0])
    spec = DecoderSpec("gru", attend="between", readout=("input", "state", "context"), combine="tanh")
    bridge = {"bridge.h.0.weight": weights["ff_state_W"].T, "bridge.h.0.bias": weights["ff_state_b"]}
    return Converted(spec, (first,), start, score, (readout, bias), second, bridge=bridge)


def gates_of_papers(weights: Weights, names: str, z_is_new: bool) -> tuple[Tensor, Tensor]:
    """(w_ih of these matrices side by side, w_hh) of r, z, n, from matrices W, W_z, W_r, ....

    1 - sigmoid(x) is sigmoid(-x): where z is the share of the new state, its rows change sign.
    """
    sign = -1.0 if z_is_new else 1.0

    def rows(name: str) -> Tensor:
        return torch.cat((weights[f"{name}_r"], sign * weights[f"{name}_z"], weights[name]))

    return torch.cat([rows(name) for name in names], 1), rows("U")


def unbiased(w_ih: Tensor, w_hh: Tensor) -> CellParams:
    zeros = w_ih.new_zeros(len(w_ih))
    return w_ih, w_hh, zeros, zeros


def unbiased_map(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A map without the bias that its place has: 0."""
    return {f"{name}.weight": weight, f"{name}.bias": weight.new_zeros(len(weight))}


def bahdanau(weights: Weights) -> Converted:
    """Bahdanau et al. 2014, A.1.2 and A.2.2: readout of (s_{i-1}, E y_{i-1}, c_i)."""
    layer = unbiased(*gates_of_papers(weights, "WC", z_is_new=True))

    def start(memory: Memory) -> tuple[LayerState, ...]:
        return ((linear(memory.state[-1][0].chunk(2, 1)[1], weights["W_s"]).tanh(),),)

    readout = torch.cat([weights[name] for name in ("U_o", "V_o", "C_o")], 1)
    spec = DecoderSpec("gru_reset_before", context_to="first", readout=("prev_state", "input", "context"),
                       combine="maxout")  # fmt: skip
    score = Score(weights["U_a"], weights["W_a"], v=weights["v_a"])
    return Converted(spec, (layer,), start, score, (readout, None), bridge=unbiased_map("bridge.h.0", weights["W_s"]))


def cho(weights: Weights) -> Converted:
    """Cho et al. 2014, A.1.2: C c beside U h, so that the reset gate multiplies both; readout of (h, E y, c)."""
    layer = unbiased(*gates_of_papers(weights, "W", z_is_new=False))
    beside, _ = gates_of_papers(weights, "C", z_is_new=False)

    def summary(memory: Memory) -> Tensor:
        return linear(memory.state[-1][0], weights["V"]).tanh()

    def start(memory: Memory) -> tuple[LayerState, ...]:
        return ((linear(summary(memory), weights["V'"]).tanh(),),)

    readout = torch.cat([weights[name] for name in ("O_h", "O_y", "O_c")], 1)
    spec = DecoderSpec("gru", attention=False, context_to="first", context_side="hidden",
                       readout=("state", "input", "context"), combine="maxout")  # fmt: skip
    bridge = unbiased_map("summary", weights["V"]) | unbiased_map("bridge.h.0", weights["V'"])
    return Converted(spec, (layer,), start, readout=(readout, None), context_hidden=beside, context=summary,
                     bridge=bridge)  # fmt: skip


def luong_local(weights: Weights, window: int = 2) -> Converted:
    """Luong et al. 2015: h . (W_a h_s), the key projected; readout of (context, state)."""
    layers = torch_cells(weights, "rnn.{1}.{0}")
    score = Score(weights["W_a"], window=(weights["W_p"], weights["v_p"]))
    spec = DecoderSpec("lstm", len(layers), attend="after", feed="output", combine="tanh", window=window)
    return Converted(spec, layers, score=score, readout=(weights["W_c"], None))


def sutskever(weights: Weights) -> Converted:
    """Sutskever et al. 2014: nothing but the layers."""
    layers = torch_cells(weights, "rnn.{0}_l{1}")
    return Converted(DecoderSpec("lstm", len(layers), attention=False, readout=("state",)), layers)

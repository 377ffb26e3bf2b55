"""The decoders of toolkits and papers, step by step in their own parameters, names, gates and order of concatenation.

Written from the formulas alone; nothing here is shared with fastseq but the vocabulary of `fastseq.spec`. Every model
takes y [B, T, I], the encoder's result and the factors of its dropouts, and gives its results by name: out, weights,
h_n.<layer>, c_n.<layer>, and f_n, what is fed back.

Letters: B rows, T steps, S source positions, I input, H hidden, D memory, A attention units, R readout, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastseq.spec import DropoutMasks, LayerState, Memory
from tests.oracle import Results

__all__ = ["GNMT", "Bahdanau", "Bentrevett", "Cho", "Fairseq", "LuongLocal", "Nematus", "OpenNMT", "Sizes",
           "Sutskever", "TensorflowNMT", "gathered"]  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Where a toolkit has one size for several of these, it takes H."""

    B: int = 4
    T: int = 5
    S: int = 6
    I: int = 5  # noqa: E741  (the project's letter)
    H: int = 8
    D: int = 12
    A: int = 7
    R: int = 9
    L: int = 2


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def at(factors: Tensor | None, t: int) -> Tensor | float:
    """A dropout's factors at step t; 1 where there is none."""
    return 1.0 if factors is None else factors[..., t, :]


def between(masks: DropoutMasks, layer: int, t: int) -> Tensor | float:
    """The factors on what `layer` reads of the layer below at step t."""
    return 1.0 if masks.layers is None or layer == 0 else masks.layers[layer - 1, :, t]


def torch_step(cell: nn.Module, x: Tensor, state: LayerState) -> LayerState:
    """One step of torch's LSTMCell or GRUCell."""
    return cell(x, state) if isinstance(cell, nn.LSTMCell) else (cell(x, state[0]),)


def gathered(outs: Sequence[Tensor], weights: Sequence[Tensor], layers: Sequence[LayerState],
             feed: Tensor | None = None) -> Results:  # fmt: skip
    """The results of steps [B, R] and [B, S] by name."""
    named = {"out": torch.stack(tuple(outs), 1)}
    if weights:
        named["weights"] = torch.stack(tuple(weights), 1)
    for index, layer in enumerate(layers):
        named |= {f"{letter}_n.{index}": leaf for letter, leaf in zip("hc", layer, strict=False)}
    return named if feed is None else named | {"f_n": feed}


class OpenNMT(nn.Module):
    """OpenNMT-py's InputFeedRNNDecoder, without `feed` its StdRNNDecoder, and GlobalAttention. Time-major; D = A = H.

    The encoder's bridge, of `dirs` directions: one Linear for h and one for c, over all layers' H / dirs features.
    score: "dot", "general", "mlp" or "none", which has no attention.
    """

    def __init__(
        self,
        n: Sizes,
        cell: str = "lstm",
        score: str = "general",
        feed: bool = True,
        bridge: bool = False,
        dirs: int = 2,
    ) -> None:
        super().__init__()
        self.feed, self.score, size = feed, score, n.H
        if feed:
            kind, reads = nn.LSTMCell if cell == "lstm" else nn.GRUCell, [n.I + size] + [size] * (n.L - 1)
            self.rnn: nn.Module = nn.ModuleDict({"layers": nn.ModuleList(kind(x, size) for x in reads)})
        else:
            self.rnn = (nn.LSTM if cell == "lstm" else nn.GRU)(n.I, size, n.L)
        parts = {} if score == "none" else {"linear_out": nn.Linear(2 * size, size, bias=score == "mlp")}
        if score == "general":
            parts["linear_in"] = nn.Linear(size, size, bias=False)
        if score == "mlp":
            parts["linear_context"] = nn.Linear(size, size, bias=False)
            parts["linear_query"] = nn.Linear(size, size, bias=True)
            parts["v"] = nn.Linear(size, 1, bias=False)
        self.attn, total = nn.ModuleDict(parts), n.L * size // dirs
        self.bridge = nn.ModuleList(nn.Linear(total, total) for _ in range(2 if cell == "lstm" else 1) if bridge)

    def across(self, layers: list[LayerState]) -> list[LayerState]:
        """The bridge: the layers' halves side by side, [B, 2 L, H / 2], are cut into two rows of L halves each.

        Of one direction nothing is cut.
        """
        leaves = []
        for linear, states in zip(self.bridge, zip(*layers, strict=True), strict=True):
            halves = torch.stack(states, 1)  # [B, L, H]
            leaves.append(linear(halves.reshape(-1, linear.in_features)).relu().view_as(halves).unbind(1))
        return list(zip(*leaves, strict=True))

    def forward(self, y: Tensor, memory: Memory, masks: DropoutMasks) -> Results:
        emb, bank = y.transpose(0, 1), memory.out.transpose(0, 1)
        layers = self.across(list(memory.state)) if len(self.bridge) else list(memory.state)
        if not self.feed:
            return self.without_feed(emb, bank, memory._replace(state=tuple(layers)), masks)
        feed, outs, aligned = emb.new_zeros(emb.shape[1], bank.shape[2]), [], []
        for t, emb_t in enumerate(emb):
            x = torch.cat((emb_t, feed), 1)
            for i, cell in enumerate(self.rnn["layers"]):
                layers[i] = torch_step(cell, x * between(masks, i, t), layers[i])
                x = layers[i][0]
            attn_h, align = self.attend(x, bank, memory.mask)
            feed = attn_h * at(masks.output, t)
            outs.append(feed)
            aligned.append(align)
        return gathered(outs, aligned, layers, feed)

    def without_feed(self, emb: Tensor, bank: Tensor, memory: Memory, masks: DropoutMasks) -> Results:
        """The whole recurrence first, then the attention of every step."""
        leaves = [torch.stack(leaf) for leaf in zip(*memory.state, strict=True)]  # each [L, B, H]
        top, last = self.rnn(emb, tuple(leaves) if len(leaves) == 2 else leaves[0])
        attended = [self.attend(h, bank, memory.mask) for h in top]
        outs = [attn_h * at(masks.output, t) for t, (attn_h, _) in enumerate(attended)]
        final = zip(*last, strict=True) if len(leaves) == 2 else zip(last, strict=True)
        return gathered(outs, [align for _, align in attended], list(final))

    def attend(self, s: Tensor, bank: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.score == "none":
            return s, torch.zeros_like(bank[:, :, 0].T)
        if self.score == "mlp":
            uh, wq = self.attn["linear_context"](bank), self.attn["linear_query"](s)
            scores = self.attn["v"](torch.tanh(wq + uh))[:, :, 0]  # [S, B]
        else:
            scores = (bank * (self.attn["linear_in"](s) if self.score == "general" else s)).sum(2)
        align = torch.softmax(scores.T if mask is None else scores.T.masked_fill(~mask, -torch.inf), 1)
        c = torch.einsum("bs,sbd->bd", align, bank)
        attn_h = self.attn["linear_out"](torch.cat((c, s), 1))
        return attn_h if self.score == "mlp" else attn_h.tanh(), align


class Fairseq(nn.Module):
    """fairseq's LSTMDecoder and AttentionLayer: time-major, R = H; an encoder of another size is projected."""

    def __init__(self, n: Sizes, attention: bool = True) -> None:
        super().__init__()
        self.attends = attention
        self.layers = nn.ModuleList(nn.LSTMCell(x, n.H) for x in [n.I + n.H] + [n.H] * (n.L - 1))
        parts = {"input_proj": nn.Linear(n.H, n.D, bias=False), "output_proj": nn.Linear(n.H + n.D, n.H, bias=False)}
        self.attention = nn.ModuleDict(parts if attention else {})
        if n.D != n.H:
            self.encoder_hidden_proj, self.encoder_cell_proj = nn.Linear(n.D, n.H), nn.Linear(n.D, n.H)

    def forward(self, y: Tensor, memory: Memory, masks: DropoutMasks) -> Results:
        x, encoded = y.transpose(0, 1), memory.out.transpose(0, 1)
        hiddens, cells = ([layer[k] for layer in memory.state] for k in (0, 1))
        if hasattr(self, "encoder_hidden_proj"):
            hiddens, cells = [self.encoder_hidden_proj(h) for h in hiddens], [self.encoder_cell_proj(c) for c in cells]
        feed, outs, aligned = torch.zeros_like(hiddens[0]), [], []
        for t in range(len(x)):
            below = torch.cat((x[t] * at(masks.input, t), feed), 1)
            for i, cell in enumerate(self.layers):
                hiddens[i], cells[i] = cell(below * between(masks, i, t), (hiddens[i], cells[i]))
                below = hiddens[i]
            if not self.attends:
                feed = below * at(masks.output, t)
                outs.append(feed)
                continue
            scores = (encoded * self.attention["input_proj"](below)).sum(2)  # [S, B]
            if memory.mask is not None:
                scores = scores.masked_fill(~memory.mask.T, -torch.inf)
            scores = scores.softmax(0)
            seen = (scores[:, :, None] * encoded).sum(0)
            feed = self.attention["output_proj"](torch.cat((seen, below), 1)).tanh() * at(masks.output, t)
            outs.append(feed)
            aligned.append(scores.T)
        return gathered(outs, aligned, list(zip(hiddens, cells, strict=True)), feed)


class TensorflowNMT(nn.Module):
    """tensorflow/nmt's attention model: an AttentionWrapper around all layers, in TensorFlow's variables; A = R = H.

    BasicLSTMCell has one kernel [X + H, 4 H] of gates i, j, f, o and adds forget_bias = 1; GRUCell resets h before the
    product. Scores: "luong", "scaled_luong", "bahdanau", "normed_bahdanau".
    """

    FORGET_BIAS = 1.0

    def __init__(self, n: Sizes, cell: str = "lstm", score: str = "scaled_luong") -> None:
        super().__init__()
        self.score = score
        self.v = nn.ParameterDict({"memory_layer/kernel": weight(n.D, n.H)})
        for i, read in enumerate(self.reads(n)):
            if cell == "lstm":
                self.v[f"cell_{i}/basic_lstm_cell/kernel"] = weight(read + n.H, 4 * n.H)
                self.v[f"cell_{i}/basic_lstm_cell/bias"] = weight(4 * n.H)
            else:
                for part, rows in (("gates", 2 * n.H), ("candidate", n.H)):
                    self.v[f"cell_{i}/gru_cell/{part}/kernel"] = weight(read + n.H, rows)
                    self.v[f"cell_{i}/gru_cell/{part}/bias"] = weight(rows)
        if "bahdanau" in score:
            self.v["query_layer/kernel"], self.v["attention_v"] = weight(n.H, n.H), weight(n.H)
        if score in ("scaled_luong", "normed_bahdanau"):
            self.v["attention_g"] = weight()
        if score == "normed_bahdanau":
            self.v["attention_b"] = weight(n.H)
        self.add_output(n)

    def reads(self, n: Sizes) -> list[int]:
        """The features of each layer's input."""
        return [n.I + n.H] + [n.H] * (n.L - 1)

    def add_output(self, n: Sizes) -> None:
        self.v["attention_layer/kernel"] = weight(n.H + n.D, n.H)

    def cell(self, i: int, x: Tensor, state: LayerState) -> LayerState:
        v = self.v
        if len(state) == 2:
            kernel, bias = (v[f"cell_{i}/basic_lstm_cell/{name}"] for name in ("kernel", "bias"))
            gate_i, j, f, o = (torch.cat((x, state[0]), 1) @ kernel + bias).chunk(4, 1)
            c = state[1] * torch.sigmoid(f + self.FORGET_BIAS) + torch.sigmoid(gate_i) * torch.tanh(j)
            return torch.tanh(c) * torch.sigmoid(o), c
        name, h = f"cell_{i}/gru_cell", state[0]
        gates = torch.cat((x, h), 1) @ v[f"{name}/gates/kernel"] + v[f"{name}/gates/bias"]
        r, u = torch.sigmoid(gates).chunk(2, 1)
        new = torch.cat((x, r * h), 1) @ v[f"{name}/candidate/kernel"] + v[f"{name}/candidate/bias"]
        return (u * h + (1 - u) * new.tanh(),)

    def attend(self, query: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Context [B, D] and alignments [B, S]."""
        v, keys = self.v, memory.out @ self.v["memory_layer/kernel"]
        if "luong" in self.score:
            scores = (keys @ query[:, :, None])[:, :, 0]
            if self.score == "scaled_luong":
                scores = v["attention_g"] * scores
        else:
            q = (query @ v["query_layer/kernel"])[:, None]
            if self.score == "normed_bahdanau":
                normed = v["attention_g"] * v["attention_v"] * torch.rsqrt(v["attention_v"].square().sum())
                scores = (normed * torch.tanh(keys + q + v["attention_b"])).sum(2)
            else:
                scores = (v["attention_v"] * torch.tanh(keys + q)).sum(2)
        if memory.mask is not None:
            scores = torch.where(memory.mask, scores, -torch.inf)
        align = scores.softmax(1)
        return (align[:, None] @ memory.out)[:, 0], align

    def forward(self, y: Tensor, memory: Memory, masks: DropoutMasks) -> Results:
        layers, attention, outs, aligned = list(memory.state), torch.zeros_like(memory.state[0][0]), [], []
        for inputs in y.unbind(1):
            x = torch.cat((inputs, attention), 1)
            for i in range(len(layers)):
                layers[i] = self.cell(i, x, layers[i])
                x = layers[i][0]
            context, align = self.attend(x, memory)
            attention = torch.cat((x, context), 1) @ self.v["attention_layer/kernel"]
            outs.append(attention)
            aligned.append(align)
        return gathered(outs, aligned, layers, attention)


class GNMT(TensorflowNMT):
    """tensorflow/nmt's gnmt_v2: layer 0 asks, its context joins every upper layer; residuals from layer 2 on."""

    def reads(self, n: Sizes) -> list[int]:
        return [n.I + n.D] + [n.H + n.D] * (n.L - 1)

    def add_output(self, n: Sizes) -> None:
        """The output is the last layer's."""

    def forward(self, y: Tensor, memory: Memory, masks: DropoutMasks) -> Results:
        bottom, *upper = memory.state
        backward = tuple(leaf.chunk(2, 1)[1] for leaf in bottom)  # of two directions
        layers = [backward, *upper]
        context, outs, aligned = torch.zeros_like(memory.out[:, 0]), [], []
        for inputs in y.unbind(1):
            layers[0] = self.cell(0, torch.cat((inputs, context), 1), layers[0])
            context, align = self.attend(layers[0][0], memory)
            x = layers[0][0]
            for i in range(1, len(layers)):
                layers[i] = self.cell(i, torch.cat((x, context), 1), layers[i])
                x = layers[i][0] + x if i >= 2 else layers[i][0]
            outs.append(x)
            aligned.append(align)
        return gathered(outs, aligned, layers, context)


class Bentrevett(nn.Module):
    """Tutorial 3 of bentrevett/pytorch-seq2seq, masked as in its 4: time-major, one GRU layer, A = H."""

    def __init__(self, n: Sizes) -> None:
        super().__init__()
        self.encoder_fc = nn.Linear(n.D, n.H)
        self.attn, self.v = nn.Linear(n.H + n.D, n.H), nn.Linear(n.H, 1, bias=False)
        self.rnn = nn.GRU(n.I + n.D, n.H)

    def forward(self, y: Tensor, memory: Memory, masks: DropoutMasks) -> Results:
        hidden, outputs = self.encoder_fc(memory.state[-1][0]).tanh(), memory.out
        outs, aligned = [], []
        for t, embedded in enumerate(y.transpose(0, 1)):
            embedded = embedded * at(masks.input, t)
            repeated = hidden[:, None].expand(-1, outputs.shape[1], -1)
            energy = self.v(self.attn(torch.cat((repeated, outputs), 2)).tanh())[:, :, 0]
            a = (energy if memory.mask is None else energy.masked_fill(~memory.mask, -1e10)).softmax(1)
            weighted = (a[:, None] @ outputs)[:, 0]
            _, last = self.rnn(torch.cat((embedded, weighted), 1)[None], hidden[None])
            hidden = last[0]
            outs.append(torch.cat((hidden, weighted, embedded), 1))
            aligned.append(a)
        return gathered(outs, aligned, [(hidden,)])


class Nematus(nn.Module):
    """Nematus' conditional GRU (gru_cond) and readout, in Theano's variables [in, out]; Marian's "s2s" is the same.

    Gates r, u; the bias of the first cell stands with its input, that of the second with the recurrent product.
    """

    def __init__(self, n: Sizes) -> None:
        super().__init__()
        shapes = {
            "W": (n.I, 2 * n.H), "U": (n.H, 2 * n.H), "b": (2 * n.H,), "Wx": (n.I, n.H), "Ux": (n.H, n.H), "bx": (n.H,),
            "W_comb_att": (n.H, n.A), "Wc_att": (n.D, n.A), "b_att": (n.A,), "U_att": (n.A, 1),
            "U_nl": (n.H, 2 * n.H), "b_nl": (2 * n.H,), "Wc": (n.D, 2 * n.H), "Ux_nl": (n.H, n.H), "bx_nl": (n.H,),
            "Wcx": (n.D, n.H), "ff_state_W": (n.D, n.H), "ff_state_b": (n.H,),
        }  # fmt: skip
        for part, size in (("lstm", n.H), ("prev", n.I), ("ctx", n.D)):
            shapes |= {f"ff_logit_{part}_W": (size, n.R), f"ff_logit_{part}_b": (n.R,)}
        self.v = nn.ParameterDict({name: weight(*shape) for name, shape in shapes.items()})
        self.register_buffer("c_tt", torch.tensor(0.7))  # a bias of every score: it leaves the softmax as it is

    def forward(self, y: Tensor, memory: Memory, masks: DropoutMasks) -> Results:
        v, contexts = self.v, memory.out.transpose(0, 1)  # [S, B, D]
        mask = torch.ones_like(contexts[:, :, 0]) if memory.mask is None else memory.mask.T.to(y.dtype)
        mean = (contexts * mask[:, :, None]).sum(0) / mask.sum(0)[:, None]
        h, projected = torch.tanh(mean @ v["ff_state_W"] + v["ff_state_b"]), contexts @ v["Wc_att"] + v["b_att"]
        outs, aligned = [], []
        for t, emb in enumerate(y.transpose(0, 1)):
            emb = emb * at(masks.input, t)
            r, u = torch.sigmoid(h @ v["U"] + emb @ v["W"] + v["b"]).chunk(2, 1)
            h1 = torch.tanh(h @ v["Ux"] * r + emb @ v["Wx"] + v["bx"])
            h1 = u * h + (1 - u) * h1
            alpha = (torch.tanh(projected + h1 @ v["W_comb_att"]) @ v["U_att"])[:, :, 0] + self.c_tt
            alpha = torch.exp(alpha - alpha.max(0).values) * mask
            alpha = alpha / alpha.sum(0)
            ctx = (contexts * alpha[:, :, None]).sum(0)
            r, u = torch.sigmoid(h1 @ v["U_nl"] + v["b_nl"] + ctx @ v["Wc"]).chunk(2, 1)
            h2 = torch.tanh((h1 @ v["Ux_nl"] + v["bx_nl"]) * r + ctx @ v["Wcx"])
            h = u * h1 + (1 - u) * h2
            parts = {"lstm": h, "prev": emb, "ctx": ctx}
            logit = sum(x @ v[f"ff_logit_{part}_W"] + v[f"ff_logit_{part}_b"] for part, x in parts.items())
            outs.append(torch.tanh(logit))
            aligned.append(alpha.T)
        return gathered(outs, aligned, [(h,)])


class Bahdanau(nn.Module):
    """Bahdanau et al. 2014, appendix A.1.2 and A.2.2, without biases as printed there; z is the share of the new."""

    def __init__(self, n: Sizes) -> None:
        super().__init__()
        shapes = {f"{m}{g}": (n.H, size) for g in ("", "_z", "_r") for m, size in (("W", n.I), ("U", n.H), ("C", n.D))}
        shapes |= {"W_a": (n.A, n.H), "U_a": (n.A, n.D), "v_a": (n.A,), "W_s": (n.H, n.D // 2)}
        shapes |= {"U_o": (2 * n.R, n.H), "V_o": (2 * n.R, n.I), "C_o": (2 * n.R, n.D)}
        self.v = nn.ParameterDict({name: weight(*shape) for name, shape in shapes.items()})

    def forward(self, y: Tensor, memory: Memory, masks: DropoutMasks) -> Results:
        v = {name: value.t() for name, value in self.v.items()}  # rows are [B, ...] here, columns in the paper
        s = torch.tanh(memory.state[-1][0].chunk(2, 1)[1] @ v["W_s"])  # the backward state at the first word
        projected, outs, aligned = memory.out @ v["U_a"], [], []
        for t, e in enumerate(y.unbind(1)):
            energy = torch.tanh((s @ v["W_a"])[:, None] + projected) @ v["v_a"]
            a = (energy if memory.mask is None else energy.masked_fill(~memory.mask, -torch.inf)).softmax(1)
            c = torch.einsum("bs,bsd->bd", a, memory.out)
            both = s @ v["U_o"] + e @ v["V_o"] + c @ v["C_o"]  # s is the previous state
            outs.append(torch.maximum(both[:, 0::2], both[:, 1::2]) * at(masks.output, t))
            z = torch.sigmoid(e @ v["W_z"] + s @ v["U_z"] + c @ v["C_z"])
            r = torch.sigmoid(e @ v["W_r"] + s @ v["U_r"] + c @ v["C_r"])
            s = (1 - z) * s + z * torch.tanh(e @ v["W"] + (r * s) @ v["U"] + c @ v["C"])
            aligned.append(a)
        return gathered(outs, aligned, [(s,)])


class Cho(nn.Module):
    """Cho et al. 2014, appendix A.1.2: the summary c = tanh(V h) within the reset gate's bracket; D is that of c."""

    def __init__(self, n: Sizes) -> None:
        super().__init__()
        shapes = {f"{m}{g}": (n.H, size) for g in ("", "_z", "_r") for m, size in (("W", n.I), ("U", n.H), ("C", n.D))}
        shapes |= {"V": (n.D, n.D), "V'": (n.H, n.D)}
        shapes |= {"O_h": (2 * n.R, n.H), "O_y": (2 * n.R, n.I), "O_c": (2 * n.R, n.D)}
        self.v = nn.ParameterDict({name: weight(*shape) for name, shape in shapes.items()})

    def forward(self, y: Tensor, memory: Memory, masks: DropoutMasks) -> Results:
        v = {name: value.t() for name, value in self.v.items()}
        c = torch.tanh(memory.state[-1][0] @ v["V"])
        h, outs = torch.tanh(c @ v["V'"]), []
        for t, e in enumerate(y.unbind(1)):
            z = torch.sigmoid(e @ v["W_z"] + h @ v["U_z"] + c @ v["C_z"])
            r = torch.sigmoid(e @ v["W_r"] + h @ v["U_r"] + c @ v["C_r"])
            h = z * h + (1 - z) * torch.tanh(e @ v["W"] + r * (h @ v["U"] + c @ v["C"]))
            both = h @ v["O_h"] + e @ v["O_y"] + c @ v["O_c"]
            outs.append(torch.maximum(both[:, 0::2], both[:, 1::2]) * at(masks.output, t))
        return gathered(outs, [], [(h,)])


class LuongLocal(nn.Module):
    """Luong et al. 2015: stacked LSTM, general score, local-p attention (eq. 9 and 10), attentional state fed back."""

    def __init__(self, n: Sizes, window: int = 2) -> None:
        super().__init__()
        self.window, self.rnn = window, nn.ModuleList(nn.LSTMCell(x, n.H) for x in [n.I + n.R] + [n.H] * (n.L - 1))
        self.W_a, self.W_c = weight(n.H, n.D), weight(n.R, n.D + n.H)
        self.W_p, self.v_p = weight(n.A, n.H), weight(n.A)

    def look(self, h: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Context [D] and weights [S] of one row, whose source has S positions."""
        p = len(memory) * torch.sigmoid(self.v_p @ torch.tanh(self.W_p @ h))
        places = torch.arange(len(memory), dtype=h.dtype)
        inside = (places >= p - self.window) & (places <= p + self.window)
        scores = torch.stack([h @ self.W_a @ row for row in memory])
        align = torch.exp(scores - scores.max()) * inside
        a = align / align.sum() * torch.exp(-((places - p) ** 2) / (2 * (self.window / 2) ** 2))
        return a @ memory, a

    def forward(self, y: Tensor, memory: Memory, masks: DropoutMasks) -> Results:
        source = memory.out.shape[1]
        lengths = [source] * len(y) if memory.mask is None else memory.mask.sum(1).tolist()
        layers, fed, outs, aligned = list(memory.state), y.new_zeros(len(y), len(self.W_c)), [], []
        for t, x in enumerate(y.unbind(1)):
            below = torch.cat((x, fed), 1)
            for i, cell in enumerate(self.rnn):
                layers[i] = cell(below * between(masks, i, t), layers[i])
                below = layers[i][0]
            rows = [self.look(h, bank[:length]) for h, bank, length in zip(below, memory.out, lengths, strict=True)]
            c = torch.stack([context for context, _ in rows])
            fed = torch.tanh(torch.cat((c, below), 1) @ self.W_c.T) * at(masks.output, t)
            outs.append(fed)
            aligned.append(torch.stack([nn.functional.pad(a, (0, source - len(a))) for _, a in rows]))
        return gathered(outs, aligned, layers, fed)


class Sutskever(nn.Module):
    """Sutskever et al. 2014: stacked LSTM that starts from the encoder's state."""

    def __init__(self, n: Sizes) -> None:
        super().__init__()
        self.rnn = nn.LSTM(n.I, n.H, n.L)

    def forward(self, y: Tensor, memory: Memory, masks: DropoutMasks) -> Results:
        h0, c0 = (torch.stack([layer[k] for layer in memory.state]) for k in (0, 1))
        out, (h, c) = self.rnn(y.transpose(0, 1), (h0, c0))
        return gathered(list(out), [], list(zip(h, c, strict=True)))

"""`fastseq.Decoder`'s presets are the toolkits' decoders: with their converted weights they give the same results.

The weights arrive by name, none missing and none left over, and the gradients go back to the toolkit's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.joey import joeynmt
from fastseq import Attention, Bridge, Decoder, Encoder, LocalP
from fastseq.spec import DropoutMasks
from tests.oracle import Results
from tests.toolkit_oracle import KITS, SIZES, Problem, Step, check_exactly, named
from tests.toolkit_weights import joeynmt as from_joeynmt
from tests.toolkits import Sizes

Build = Callable[..., Decoder]  # of Sizes, and options of Decoder


def nothing(n: Sizes) -> dict[str, Any]:
    return {}


def preset(method: Build, sized: Callable[[Sizes], dict[str, Any]] = nothing, **chosen: Any) -> Build:
    """The class method with a toolkit's sizes; `sized` makes options of them."""

    def build(n: Sizes, **options: Any) -> Decoder:
        return method(n.I, n.H, n.L, memory_size=n.D, **(chosen | sized(n) | options))

    return build


def combined(n: Sizes) -> dict[str, Any]:
    return {"combine_size": n.R}


def additive(n: Sizes, **options: Any) -> dict[str, Any]:
    """A score of its own size too."""
    return {"combine_size": n.R, "attention": partial(Attention, attn_size=n.A, **options)}


JOINT = Bridge(map="joint", act="relu")
normed = partial(Attention, query_bias=True, normalize=True)
PRESETS: dict[str, Build] = {
    "opennmt-dot": preset(Decoder.opennmt, attention="dot"),
    "opennmt-general": preset(Decoder.opennmt),
    "opennmt-mlp": preset(Decoder.opennmt, attention="additive"),
    "opennmt-general-gru": preset(Decoder.opennmt, cell="gru"),
    "opennmt-mlp-gru": preset(Decoder.opennmt, attention="additive", cell="gru"),
    "opennmt-general-std": preset(Decoder.opennmt, feed=None),
    "opennmt-mlp-std-gru": preset(Decoder.opennmt, attention="additive", cell="gru", feed=None),
    "opennmt-general-bridge": preset(Decoder.opennmt, bridge=JOINT),
    "opennmt-mlp-bridge-gru": preset(Decoder.opennmt, attention="additive", cell="gru", bridge=JOINT),
    "fairseq": preset(Decoder.fairseq),
    "fairseq-same-size": preset(Decoder.fairseq),
    "joeynmt-bahdanau": preset(Decoder.joeynmt),
    "joeynmt-luong": preset(Decoder.joeynmt, attention="general"),
    "joeynmt-bahdanau-gru": preset(Decoder.joeynmt, cell="gru"),
    "joeynmt-luong-gru": preset(Decoder.joeynmt, attention="general", cell="gru", bridge=Bridge("zero")),
    "joeynmt-luong-last": preset(Decoder.joeynmt, attention="general", bridge=Bridge("top_forward", cell="same")),
    "joeynmt-bahdanau-not-fed": preset(Decoder.joeynmt, feed=None),
    "joeynmt-luong-gru-not-fed": preset(Decoder.joeynmt, attention="general", cell="gru", feed=None,
                                        bridge=Bridge("top_forward")),
    "tf-luong": preset(Decoder.tf_nmt, attention="general"),
    "tf-scaled-luong": preset(Decoder.tf_nmt),
    "tf-bahdanau": preset(Decoder.tf_nmt, attention="additive"),
    "tf-normed-bahdanau": preset(Decoder.tf_nmt, attention=normed),
    "tf-scaled-luong-gru": preset(Decoder.tf_nmt, cell="gru_reset_before"),
    "gnmt-normed-bahdanau": preset(Decoder.gnmt),
    "gnmt-scaled-luong-gru": preset(Decoder.gnmt, cell="gru_reset_before",
                                    attention=partial(Attention, score="general", scale="learned")),
    "bentrevett": preset(Decoder.bentrevett),
    "nematus": preset(Decoder.conditional_gru, partial(additive, query_bias=True)),
    "bahdanau": preset(Decoder.bahdanau, additive),
    "cho": preset(Decoder.cho, lambda n: {"summary_size": n.D, "combine_size": n.R}),
    "luong-local": preset(Decoder.luong, combined, attention=partial(Attention, score="general", window=LocalP(2))),
    "sutskever": preset(Decoder.sutskever),
}  # fmt: skip
OPTIONS = {"input": "input_dropout", "layers": "dropout", "readout": "readout_dropout", "output": "output_dropout"}


def step_of(problem: Problem, decoder: Decoder, seed: int = 0) -> Step:
    """The results of `decoder` with the toolkit's weights in the place of its own."""

    def step(t: dict[str, Tensor]) -> Results:
        weights = problem.converted(t).named()
        torch.manual_seed(seed)
        result = torch.func.functional_call(
            decoder, weights, (t["y"], problem.memory(t)), {"need_weights": True}, strict=True
        )
        return named(result)

    return step


def test_every_toolkit_has_its_preset() -> None:
    assert PRESETS.keys() == KITS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    kit = KITS[name]
    for sizes in ("several", "odd", "deep"):
        problem = Problem.draw(kit, SIZES[sizes], kit.masks[-1])
        decoder = PRESETS[name](problem.sizes).eval()
        assert decoder.spec == problem.converted(problem.tensors).spec
        check_exactly(step_of(problem, decoder), problem)


@pytest.mark.parametrize("name", [name for name, kit in KITS.items() if kit.dropouts])
def test_dropouts(name: str) -> None:
    """The decoder's own draws, in their documented order, put where the toolkit has its dropouts."""
    kit = KITS[name]
    problem = Problem.draw(kit, SIZES["several"], dropout=True)
    decoder = PRESETS[name](problem.sizes, **{OPTIONS[dropout]: 0.5 for dropout in kit.dropouts
                                              if getattr(problem.masks, dropout) is not None}).train()  # fmt: skip
    torch.manual_seed(5)
    drawn = [m if m is None else m.new_empty(m.shape, dtype=torch.float64).bernoulli_(0.5) * 2 for m in problem.masks]
    problem.masks = DropoutMasks(*drawn)
    check_exactly(step_of(problem, decoder, seed=5), problem)


@pytest.mark.parametrize("name", ["opennmt-general", "joeynmt-bahdanau", "gnmt-normed-bahdanau", "nematus", "bahdanau"])
def test_steps(name: str) -> None:
    """Step by step, as a toolkit generates."""
    kit = KITS[name]
    problem = Problem.draw(kit, SIZES["several"], kit.masks[-1])
    decoder = PRESETS[name](problem.sizes).double().eval()
    tensors = {key: t.double() for key, t in problem.tensors.items()}
    decoder.load_state_dict(problem.converted(tensors).named())
    truth, memory = problem.toolkit(tensors), problem.memory(tensors)
    with torch.no_grad():
        keys, state = decoder.prepare(memory), decoder.init_state(memory)
        for t, y in enumerate(tensors["y"].unbind(1)):
            output, state, weights = decoder.step(y, keys, state, need_weights=True)
            torch.testing.assert_close(output, truth["out"][:, t], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(weights, truth["weights"][:, t], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_joeynmt_from_source_to_logits(cell: str) -> None:
    """Its encoder, decoder and output layer together: what the one hands to the other is the same too."""
    hidden, layers, lengths = 6, 2, [5, 3, 2]
    theirs = joeynmt("encoders").RecurrentEncoder(rnn_type=cell, hidden_size=hidden, emb_size=4, num_layers=layers)
    decoder = joeynmt("decoders").RecurrentDecoder(rnn_type=cell, emb_size=7, hidden_size=8, encoder=theirs,
                                                   num_layers=layers, vocab_size=10)  # fmt: skip
    ours = Encoder(4, hidden, layers, cell=cell, bidirectional=True)
    ours.load_state_dict({f"layers.{name.split('_l')[1][0]}.{name.replace('_l1', '_l0')}": t
                          for name, t in theirs.rnn.state_dict().items()})  # fmt: skip
    preset = Decoder.joeynmt(7, 8, layers, memory_size=2 * hidden, cell=cell)
    preset.load_state_dict(from_joeynmt(decoder.state_dict()).named())
    for module in (theirs, decoder, ours, preset):
        module.double()
    src, trg = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 6, 7, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    out, last = theirs(src, torch.tensor(lengths), mask)
    logits, _, attended, _ = decoder(trg, out, last, mask[:, None], trg.shape[1])
    output, _, weights = preset(trg, ours(src, lengths), need_weights=True)
    torch.testing.assert_close(decoder.output_layer(output), logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights, attended, rtol=1e-12, atol=1e-12)
